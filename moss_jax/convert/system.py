"""A whole system: one folder with the language model, the codec, the text tokenizer and voices.

    FOLDER/system.json, transformer/, speech_tokenizer/, speech_decoder/, text_tokenizer/, voices/, carried/

Made from the two released folders, from a Qwen3, or at random; written whole or not at all.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moss_jax.checkpoint import atomic_folder
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SYSTEM_FORMAT, SystemFolder
from moss_jax.components import check_codes
from moss_jax.convert.codec import NOTES, export_codec, import_codec
from moss_jax.convert.files import carry_files, copy_file, need_folder, write_json
from moss_jax.convert.language_model import export_language_model, import_language_model, language_config
from moss_jax.convert.qwen3 import CODES, export_qwen3, import_qwen3
from moss_jax.convert.stream import Say
from moss_jax.errors import MossError
from moss_jax.files import folder_lock, is_file, is_folder
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER

# what an export to the released layouts makes
MODEL_FOLDER = "MOSS-Speech"
CODEC_FOLDER = "MOSS-Speech-Codec"
MAX_HUB_NAME = 200  # characters; the hub allows 96 for a repository
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# What is downloaded of a repository on the Hugging Face Hub: no code, and no weights in other formats.
MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "tokenizer.model",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)
CODEC_FILES = (*MODEL_FILES, "*.pt", "*.onnx", "*.yaml")
# Of a system: what belongs to its codec, and the voices, which are prompts in its codes.
CODEC_PARTS = ("speech_tokenizer", "speech_decoder", "voices", "carried/codec", "carried/unused")
NAME_LENGTH = 40  # of a model's name in the name of its conversion; atomic_folder shortens names of more than 64
PART = re.compile(r"\..*-[0-9a-f]{12}\.[0-9a-z_]{8}\.part")  # an unfinished conversion in a cache


def convert_released(model: str | Path, codec: str | Path, out: str | Path, say: Say) -> None:
    """A system from a released language model and a codec: a released one, or that of another system.

    Raises MossError and writes nothing when anything does not fit.
    """
    model = need_folder(model, "a released language model (config.json, *.safetensors, tokenizer.json)")
    config = language_config(model)
    with atomic_folder(out) as folder:
        _begin(folder, codec, say)
        check_codes(SystemFolder(folder), config, f"{model} and {codec}")  # before the long work
        import_language_model(model, folder, say)


def convert_qwen3(
    qwen3: str | Path,
    out: str | Path,
    say: Say,
    modality_layers: int | None = None,
    codec: str | Path | None = None,
    audio_branch: str = "copy",
    seed: int = 0,
) -> None:
    """A system whose language model starts from a Qwen3.

    Args:
        codec: a released codec, or a system whose speech tokenizer, speech decoder and voices are taken over unchanged.
            It decides the number of speech codes. None: that of the released codec; the system has no speech tokenizer
            or decoder.
    """
    with atomic_folder(out) as folder:
        codes = _begin(folder, codec, say)
        import_qwen3(qwen3, folder, modality_layers, codes, audio_branch, seed, say)


def export_released(system: str | Path, out: str | Path, say: Say) -> None:
    """The two released folders, `MOSS-Speech` and `MOSS-Speech-Codec`, below `out`; what the system has of them."""
    system = check_system(system)
    check_codes(SystemFolder(system))
    with atomic_folder(out) as folder:
        if (system / "transformer").is_dir():
            (folder / MODEL_FOLDER).mkdir()
            export_language_model(system, folder / MODEL_FOLDER, say)
        if (system / "speech_decoder").is_dir():
            (folder / CODEC_FOLDER).mkdir()
            export_codec(system, folder / CODEC_FOLDER, say)


def export_text_path(system: str | Path, out: str | Path, say: Say) -> None:
    """The text path of the language model as a plain Qwen3."""
    system = check_system(system)
    with atomic_folder(out) as folder:
        export_qwen3(system, folder, say)


def check_system(system: str | Path) -> Path:
    """The folder, when it is a system of a format that we read."""
    return SystemFolder(system).path


def resolve(
    model: str | Path,
    codec: str | Path | None,
    cache: Path,
    say: Say,
    revision: str | None = None,
    codec_revision: str | None = None,
) -> Path:
    """A system folder for what a person gave as --model and --codec.

    Args:
        model: a system folder; or a released language model, as a folder or a name on the Hugging Face Hub.
        codec: the released codec, as a folder or a name on the Hub, or a system; needed in the second case only.
        cache: where a released pair is converted to, once.
        say: gets lines of progress.
        revision, codec_revision: branch, tag or commit of a name on the Hub.

    Raises:
        MossError: nothing there, not on the Hub or no network, no codec given, or the conversion failed.
    """
    folder = locate(model, say, revision)
    if is_file(folder / SYSTEM_FILE):
        if codec is not None:
            raise MossError(f"{folder}: is a whole system with a codec of its own; leave --codec out")
        return check_system(folder)
    if not is_file(folder / "config.json"):
        raise MossError(f"{folder}: neither a system folder ({SYSTEM_FILE}) nor a released model (config.json)")
    if codec is None:
        raise MossError(f"{folder}: a released language model; give the codec beside it, --codec FOLDER or hub name")
    codec_folder = locate(codec, say, codec_revision, CODEC_FILES)
    target = cache / f"{Path(model).resolve().name[:NAME_LENGTH]}-{_fingerprint(folder, codec_folder)}"
    return converted_once(target, lambda: convert_released(folder, codec_folder, target, say), say)


def converted_once(target: Path, convert: Callable[[], None], say: Say) -> Path:
    """The system `target` in a cache, made by `convert` when it is not there.

    Conversions into one cache exclude each other: a process that comes second waits, and uses what the first one made.
    What killed conversions left behind is removed.

    Args:
        target: the folder; its name ends in a hyphen and 12 hexadecimal digits.
    """
    if not target.is_dir():
        cache = target.parent

        def waiting() -> None:
            say(f"note: another process is converting into {cache}; waiting until it has finished")

        with folder_lock(cache, wait=True, on_wait=waiting):
            for path in cache.iterdir():
                if PART.fullmatch(path.name):  # only the holder of the lock makes these
                    shutil.rmtree(path, ignore_errors=True)
            if not target.is_dir():
                say(f"converting into {target}, this once")
                convert()
    return check_system(target)


def locate(name: str | Path, say: Say, revision: str | None = None, files: Sequence[str] = MODEL_FILES) -> Path:
    """A folder that is there, or a name on the Hugging Face Hub (`owner/name`), downloaded into the Hub's own cache.

    Args:
        revision: branch, tag or commit of a name on the Hub; None: its main branch.
        files: patterns of the files that are downloaded, and no others.
    """
    path = Path(name)
    if is_folder(path):
        if revision is not None:
            raise MossError(f"{path}: is a folder, a revision ({revision}) is for names on the Hugging Face Hub only")
        return path
    if is_file(path):
        raise MossError(f"{path}: is a file, expected a folder")
    if not HUB_NAME.fullmatch(str(name)) or len(str(name)) > MAX_HUB_NAME:
        raise MossError(f"{name}: no such folder, and not a name on the Hugging Face Hub such as fnlp/MOSS-Speech")
    try:
        return Path(_download(str(name), revision, files))
    except Exception as error:  # the Hub's client raises its own, requests', httpx's and OS errors
        lines = str(error).strip().splitlines() or [""]
        what = name if revision is None else f"{name} at revision {revision}"
        raise MossError(
            f"{what}: not found locally or on the Hugging Face Hub ({type(error).__name__}: {lines[0][:200]}); check "
            "the name and the network, or give a folder"
        ) from error


def _download(name: str, revision: str | None, files: Sequence[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, revision=revision, allow_patterns=list(files))


def _begin(folder: Path, codec: str | Path | None, say: Say) -> int:
    """Starts a system with its codec, if there is one; returns the number of speech codes."""
    settings: dict[str, Any] = {"format": SYSTEM_FORMAT, "default_voice": None}
    codes = CODES
    if codec is not None and (Path(codec) / SYSTEM_FILE).is_file():
        system = SystemFolder(codec)
        for component_folder in ("speech_tokenizer", "speech_decoder"):
            system.component_folder(component_folder)  # raises where it is missing
        for name in CODEC_PARTS:
            if (system.path / name).is_dir():
                carry_files(system.path / name, folder / name, within=system.path)
        if (system.path / NOTES).is_file():
            copy_file(system.path / NOTES, folder / NOTES, within=system.path)
        settings["default_voice"] = system.settings.get("default_voice")
        codes = system.config(SPEECH_TOKENIZER).quantize_vocab_size
    elif codec is not None:
        codes = import_codec(codec, folder, say).tokenizer.quantize_vocab_size
    (folder / "voices").mkdir(exist_ok=True)
    write_json(folder / SYSTEM_FILE, settings)
    check_codes(SystemFolder(folder), where=str(codec))
    return codes


def _fingerprint(*folders: Path) -> str:
    """Changes when a file of the folders does."""
    digest = hashlib.sha256()
    for folder in folders:
        digest.update(str(folder.resolve()).encode())
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                status = path.stat()
                digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]

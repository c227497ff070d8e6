"""A whole system: one folder with the language model, the codec, the text tokenizer and voices.

    FOLDER/system.json, transformer/, speech_tokenizer/, speech_decoder/, text_tokenizer/, voices/, carried/

Made from the two released folders, from a Qwen3, or at random; written whole or not at all.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from moss_jax.checkpoint import atomic_folder
from moss_jax.convert.codec import export_codec, import_codec
from moss_jax.convert.files import write_json
from moss_jax.convert.language_model import export_language_model, import_language_model
from moss_jax.convert.qwen3 import CODES, export_qwen3, import_qwen3
from moss_jax.convert.stream import Say
from moss_jax.dialogue.folder import FORMAT, SYSTEM, SystemFolder
from moss_jax.errors import MossError
from moss_jax.files import is_file, is_folder
from moss_jax.transformer.config import TransformerConfig

MODEL_FOLDER, CODEC_FOLDER = "MOSS-Speech", "MOSS-Speech-Codec"  # what an export to the released layouts makes
MAX_HUB_NAME = 200  # characters; the hub allows 96 for a repository
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def convert_released(model: str | Path, codec: str | Path, out: str | Path, say: Say) -> None:
    """A system from the two released folders. Raises MossError and writes nothing when anything does not fit."""
    with atomic_folder(out) as folder:
        config = import_language_model(model, folder, say)
        _check_codes(config, import_codec(codec, folder, say).tokenizer.quantize_vocab_size)
        _finish(folder)


def convert_qwen3(
    qwen3: str | Path,
    out: str | Path,
    say: Say,
    modality_layers: int | None = None,
    codec: str | Path | None = None,
    audio_branch: str = "copy",
    seed: int = 0,
) -> None:
    """A system whose language model starts from a Qwen3; without `codec` it has no ears and no voice yet."""
    with atomic_folder(out) as folder:
        codes = CODES if codec is None else import_codec(codec, folder, say).tokenizer.quantize_vocab_size
        import_qwen3(qwen3, folder, modality_layers, codes, audio_branch, seed, say)
        _finish(folder)


def export_released(system: str | Path, out: str | Path, say: Say) -> None:
    """The two released folders, `MOSS-Speech` and `MOSS-Speech-Codec`, below `out`; what the system has of them."""
    system = check_system(system)
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


def resolve(model: str | Path, codec: str | Path | None, cache: Path, say: Say) -> Path:
    """A system folder for what a person gave as --model and --codec.

    Args:
        model: a system folder; or a released language model, as a folder or a name on the Hugging Face hub.
        codec: the released codec, as a folder or a hub name; needed in the second case only.
        cache: where a released pair is converted to, once.
        say: gets lines of progress.

    Raises:
        MossError: nothing there, not on the hub or no network, no codec given, or the conversion failed.
    """
    folder = locate(model, say)
    if is_file(folder / SYSTEM):
        if codec is not None:
            raise MossError(f"{folder}: is a whole system with a codec of its own; leave --codec out")
        return check_system(folder)
    if not is_file(folder / "config.json"):
        raise MossError(f"{folder}: neither a system folder ({SYSTEM}) nor a released model (config.json)")
    if codec is None:
        raise MossError(f"{folder}: a released language model; give the codec beside it, --codec FOLDER or hub name")
    codec_folder = locate(codec, say)
    target = cache / f"{Path(model).name}-{_fingerprint(folder, codec_folder)}"
    if not target.is_dir():
        say(f"converting into {target}, this once")
        convert_released(folder, codec_folder, target, say)
    return check_system(target)


def locate(name: str | Path, say: Say, download: Callable[[str], str] | None = None) -> Path:
    """A folder that is there, or a hub name (`owner/name`) whose files are fetched into the hub's own cache."""
    path = Path(name)
    if is_folder(path):
        return path
    if is_file(path):
        raise MossError(f"{path}: is a file, expected a folder")
    if not HUB_NAME.fullmatch(str(name)) or len(str(name)) > MAX_HUB_NAME:
        raise MossError(f"{name}: no such folder, and not a hub name such as fnlp/MOSS-Speech")
    say(f"{name}: no such folder here, looking on the Hugging Face hub")
    try:
        return Path((download or _download)(str(name)))
    except Exception as error:  # the hub's client raises its own, requests', httpx's and OS errors
        lines = str(error).strip().splitlines() or [""]
        raise MossError(
            f"{name}: no such folder, and not to be had from the Hugging Face hub ({type(error).__name__}: "
            f"{lines[0][:200]}); check the name and the network, or give a folder"
        ) from error


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name)


def _finish(folder: Path) -> None:
    (folder / "voices").mkdir()
    write_json(folder / SYSTEM, {"format": FORMAT, "default_voice": None})


def _check_codes(config: TransformerConfig, codes: int) -> None:
    if config.eosp_id != codes:
        raise MossError(
            f"language model and codec do not belong together: eosp_id is {config.eosp_id}, so there are that many "
            f"codes, but the speech tokenizer has {codes}"
        )


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

"""From the argument of `--model`, `--codec` or `--from-qwen3` to a folder on this machine.

An argument is a local folder or a repository name on the Hugging Face Hub. `find_folder` returns a local folder for it,
downloading the repository if needed. `resolve_system` returns a system folder: a released pair of language model and
codec is converted once and kept in a cache.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SystemFolder
from moss_jax.convert.system import convert_released
from moss_jax.errors import MossError
from moss_jax.files import folder_lock, is_file, is_folder
from moss_jax.progress import Say

MAX_HUB_NAME_LENGTH = 200  # characters; the Hub allows 96 for a repository
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# What is downloaded from a repository on the Hugging Face Hub: no code, and no weights in other formats.
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
# Characters of a model's name that the name of its conversion starts with; `atomic_folder` shortens names above 64.
NAME_LENGTH = 40
# The temporary folder of a conversion that is running or was killed.
UNFINISHED_CONVERSION = re.compile(r"\..*-[0-9a-f]{12}\.[0-9a-z_]{8}\.part")


def resolve_system(
    model: str | Path,
    codec: str | Path | None,
    cache: Path,
    say: Say,
    revision: str | None = None,
    codec_revision: str | None = None,
) -> Path:
    """The system folder for the arguments `--model` and `--codec`.

    Args:
        model: a system folder, or a released language model; a local folder or a repository name on the Hub.
        codec: the released codec, or a system whose codec is used; only with a released language model.
        cache: folder in which a converted pair is kept.
        say: receives progress messages.
        revision, codec_revision: branch, tag or commit on the Hub.

    Raises:
        MossError: a folder is not found locally or on the Hub, the codec is missing or superfluous, or the conversion
            failed.
    """
    folder = find_folder(model, revision)
    if is_file(folder / SYSTEM_FILE):
        if codec is not None:
            raise MossError(f"{folder}: is a complete system with its own codec; remove --codec")
        return SystemFolder(folder).path
    if not is_file(folder / "config.json"):
        raise MossError(f"{folder}: neither a system folder ({SYSTEM_FILE}) nor a released model (config.json)")
    if codec is None:
        raise MossError(f"{folder}: is a released language model, which needs a codec: add --codec FOLDER or hub name")
    codec_folder = find_folder(codec, codec_revision, CODEC_FILES)
    target = conversion_path(cache, model, _fingerprint(folder, codec_folder))
    return convert_once(target, lambda: convert_released(folder, codec_folder, target, say), say)


def find_folder(name: str | Path, revision: str | None = None, files: Sequence[str] = MODEL_FILES) -> Path:
    """A local folder, or a snapshot of a repository on the Hugging Face Hub, which is downloaded into the Hub's cache.

    Args:
        name: path of a folder, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub; None: its main branch.
        files: patterns of the files to download.

    Raises:
        MossError: neither exists, the download failed, or a revision is given for a local folder.
    """
    path = Path(name)
    if is_folder(path):
        if revision is not None:
            raise MossError(f"{path}: is a local folder; a revision ({revision}) is for names on the Hugging Face Hub")
        return path
    if is_file(path):
        raise MossError(f"{path}: is a file, expected a folder")
    if not HUB_NAME.fullmatch(str(name)) or len(str(name)) > MAX_HUB_NAME_LENGTH:
        raise MossError(f"{name}: no such folder, and not a name on the Hugging Face Hub such as fnlp/MOSS-Speech")
    try:
        return Path(_download(str(name), revision, files))
    except Exception as error:  # the Hub's client raises its own errors, those of requests or httpx, and OSError
        lines = str(error).strip().splitlines() or [""]
        what = name if revision is None else f"{name} at revision {revision}"
        raise MossError(
            f"{what}: not found locally or on the Hugging Face Hub ({type(error).__name__}: {lines[0][:200]}); check "
            "the name and the network, or give a folder"
        ) from error


def conversion_path(cache: Path, source: str | Path, fingerprint: str) -> Path:
    """Where in the cache the conversion of `source` is kept: start of its name, hyphen, 12 hexadecimal digits."""
    return cache / f"{Path(source).resolve().name[:NAME_LENGTH]}-{fingerprint}"


def convert_once(target: Path, convert: Callable[[], None], say: Say) -> Path:
    """The system `target` in a cache, which `convert` writes if it does not exist yet.

    Only one process at a time converts into a cache: a second one waits and then uses the result of the first. The
    temporary folders of conversions that were killed are removed.

    Args:
        target: see `conversion_path`.
    """
    if not target.is_dir():
        cache = target.parent

        def waiting() -> None:
            say(f"note: another process is converting into {cache}; waiting until it has finished")

        with folder_lock(cache, wait=True, on_wait=waiting):
            for path in cache.iterdir():
                if UNFINISHED_CONVERSION.fullmatch(path.name):  # of a dead process: we hold the lock
                    shutil.rmtree(path, ignore_errors=True)
            if not target.is_dir():
                say(f"converting into {target}; this is done once")
                convert()
    return SystemFolder(target).path


def _download(name: str, revision: str | None, files: Sequence[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, revision=revision, allow_patterns=list(files))


def _fingerprint(*folders: Path) -> str:
    """12 hexadecimal digits that change with the path, size or modification time of any file in the folders."""
    digest = hashlib.sha256()
    for folder in folders:
        digest.update(str(folder.resolve()).encode())
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                status = path.stat()
                digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]

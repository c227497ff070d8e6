"""Files and folders that appear whole or not at all: written beside their place under another name, then renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moss_jax.errors import MossError


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary name in the same folder; when the block ends well, the file there replaces `path`.

    Raises:
        MossError: the folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise MossError(f"{path}: is a folder, a file name is needed")
    with _readable_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    part = Path(name)
    try:
        with _readable_errors(path):
            yield part
            _sync(part)
            part.chmod(0o666 & ~_umask())
            os.replace(part, path)
            _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`; when the block ends well, it becomes `path`.

    Raises:
        MossError: `path` is there already and not empty, or cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise MossError(f"{path}: already there; remove it or choose another folder")
    with _readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with _readable_errors(path):
            yield part
            part.chmod(0o777 & ~_umask())
            os.replace(part, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename is not None and not _below(error.filename, path.parent):
            raise  # about some other file
        reason = error.strerror or str(error)
        raise MossError(f"{path}: cannot be written ({reason}); choose a place that exists and is writable") from error


def _below(path: str | Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

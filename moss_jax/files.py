"""Files and folders that are written whole or not at all, and the lock that keeps a folder to one writer.

A temporary file or folder is created next to its destination and renamed when it is complete.
"""

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from moss_jax.errors import MossError

LOCK = ".lock"  # file name of a folder's lock, which stays behind, empty and unlocked; ending of an output's lock


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary name in the same folder; when the block succeeds, the file there replaces `path`.

    Raises:
        MossError: the folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    with _readable_errors(path):
        if path.is_dir():
            raise MossError(f"{path}: is a folder, a file name is needed")
        if path.exists() and not path.is_file():
            # A device or a pipe would be replaced by a file: /dev/null, for a user who may write to /dev.
            raise MossError(f"{path}: is a device or a pipe, which a file would replace; choose a file name")
        part = _temporary_name(path)
        # Created with the mode of an ordinary file: the process's umask applies without reading it, which
        # would set it for a moment.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        with _readable_errors(path):
            yield part
            _sync(part)
            os.replace(part, path)
            _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder next to `path`; when the block succeeds, it becomes `path`.

    Raises:
        MossError: `path` already exists and is not empty, or cannot be written, or the disk is full.
    """
    path = Path(path)
    with _readable_errors(path):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise MossError(f"{path}: already exists; remove it or choose another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _temporary_name(path)
        part.mkdir()
    try:
        with _readable_errors(path):
            yield part
            os.replace(part, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """`atomic_folder` that also replaces a folder which is already there, once the new one is complete."""
    path = Path(path)
    new = path.with_name(f".{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    with atomic_folder(new) as part:
        yield part
    shutil.rmtree(path, ignore_errors=True)
    os.replace(new, path)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Makes `target` a hard link to a file that is never written to again, or a copy where links are not supported."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def is_file(path: str | Path) -> bool:
    """Whether there is a file; False for a name that no file can have (too long, half a character, a NUL in it)."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder; False for a name that no folder can have (too long, half a character, a NUL in it)."""
    return os.path.isdir(path)


def check_name(path: str | Path) -> None:
    """Raises MossError for a path that no file can have, so that long work does not end with an error about it."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MossError(f"{path}: cannot be written ({reason})") from error


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def folder_lock(
    folder: str | Path, *, wait: bool = False, on_wait: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Keeps other processes out of `folder` while the block runs; the folder is created if it does not exist.

    The operating system releases the lock when the process ends, however it ends.

    Args:
        wait: wait until the other process has finished, instead of failing at once.
        on_wait: called once when there is another process to wait for.

    Raises:
        MossError: another process holds the lock, or the folder cannot be written.
    """
    folder = Path(folder)
    with _readable_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / LOCK, folder, wait, on_wait):
        yield


@contextlib.contextmanager
def output_lock(path: str | Path, share: int = 0, shares: int = 1, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes from making the folder `path` while the block runs; `path` itself need not exist.

    The lock is a hidden file next to `path`, which is removed at the end. Several processes may make one folder
    together, each a share of it: every share has a lock of its own.

    Args:
        share: which share this process makes, from 0.
        shares: how many there are; processes that disagree about it exclude each other.
        wait: wait until the other process has finished, instead of failing at once.

    Raises:
        MossError: another process holds the lock, or works with another number of shares, or the place cannot be
            written.
    """
    path = Path(path)
    # A long name is replaced by a digest: with the ending it could be too long for the file system.
    name = path.name if len(os.fsencode(path.name)) <= 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    with _readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    own = path.parent / f".{name}.{share}-of-{shares}{LOCK}"
    with _locked(own, path, wait):
        try:
            for other in path.parent.glob(f".{glob.escape(name)}.*-of-*{LOCK}"):
                if not other.name.endswith(f"-of-{shares}{LOCK}"):
                    with _locked(other, path, wait=False):  # fails while its process runs
                        other.unlink(missing_ok=True)
            yield
        finally:
            own.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(file: Path, folder: Path, wait: bool, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    with _readable_errors(folder):
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise MossError(
                    f"{folder}: another process is writing to this folder; wait for it to finish or choose another "
                    "folder"
                ) from None
            on_wait()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _temporary_name(path: Path) -> Path:
    # The name is cut so that a long file name does not make the temporary one too long for the file system.
    return path.parent / f".{path.name[:64]}.{secrets.token_hex(4)}.part"


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

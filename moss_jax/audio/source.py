"""Where a recording comes from: a file, standard input, a pipe or a file object, always as one seekable file."""

import io
import os
import stat
import sys
from typing import IO

from moss_jax.errors import MossError

READABLE = "wav, aiff, au, caf, flac, mp3, ogg, m4a or webm"
STDIN = "-"
EBML = b"\x1aE\xdf\xa3"  # Matroska and WebM
MAGICS = (b"RIFF", b"RIFX", b"RF64", b"riff.\x91\xcf\x11", b"FORM", b"caff", b".snd", b"dns.", b"fLaC", b"OggS", EBML)
PIECE_BYTES = 2**20  # read from a pipe at a time

Source = str | bytes | os.PathLike | IO[bytes]


def source_name(source: Source) -> str:
    """The name of a source in errors and notices."""
    if source == STDIN:
        return "standard input"
    if isinstance(source, str | bytes | os.PathLike):
        return os.fsdecode(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "audio"


def open_source(source: Source, name: str, max_bytes: int) -> IO[bytes]:
    """A seekable binary file with the bytes of `source`. What is not a regular file is read into memory, once.

    Args:
        source: a path, "-" for standard input, or a binary file object, which is read to its end and not closed.
        name: of the source in errors.
        max_bytes: the most that is read into memory.

    Raises:
        MossError: the source is missing, empty, a folder or a device, cannot be read, or is larger than `max_bytes`.
    """
    try:
        file = _open(source, name, max_bytes)
        empty = not file.read(1)
        file.seek(0)
    except MossError:  # a ValueError, too
        raise
    except FileNotFoundError as error:
        raise MossError(f"{name}: no such file") from error
    except OSError as error:
        raise MossError(f"{name}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a zero byte in the name, or a file object that is closed
        raise MossError(f"{name!r}: cannot be read ({error})") from error
    if empty:
        raise MossError(f"{name}: the file is empty, expected audio ({READABLE})")
    return file


RAISE_LIMIT = "use a shorter recording or raise the limit (max_bytes; --max-audio-mib on the command line)"


def too_large(name: str, max_bytes: int) -> MossError:
    """The error for a recording that exceeds the limit of the reader."""
    return MossError(f"{name}: exceeds the limit of {max_bytes / 2**20:.6g} MiB of decoded samples; {RAISE_LIMIT}")


def truncated(name: str, what: str) -> MossError:
    """The error for a file that is not whole."""
    return MossError(f"{name}: cut short, {what}, expected a whole file")


def joined(name: str) -> MossError:
    """The error for several files one behind the other, in a container that does not allow it."""
    return MossError(f"{name}: several files seem to be joined in one, expected one recording (split or convert it)")


def is_file_start(head: bytes) -> bool:
    """Whether `head`, at least 16 bytes, begins a file of a container that `READABLE` names (mp3 has no such mark)."""
    return head.startswith(MAGICS) or head[4:8] == b"ftyp"


def bytes_at(file: IO[bytes], offset: int, count: int) -> bytes:
    """Up to `count` bytes at `offset`; fewer at the end of the file."""
    # An offset from a damaged header can be larger than the largest that `seek` takes.
    if offset >= length_of(file):
        return b""
    file.seek(offset)
    return file.read(count)


def length_of(file: IO[bytes]) -> int:
    """The number of bytes of a seekable file."""
    return file.seek(0, io.SEEK_END)


def _open(source: Source, name: str, max_bytes: int) -> IO[bytes]:
    if source == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise MossError(f"{name}: is a terminal, expected audio from a pipe or a file")
        return _in_memory(sys.stdin.buffer, name, max_bytes)
    if not isinstance(source, str | bytes | os.PathLike):
        return _in_memory(source, name, max_bytes)
    kind = os.stat(source).st_mode
    if stat.S_ISDIR(kind):
        raise MossError(f"{name}: is a folder, expected an audio file ({READABLE})")
    if stat.S_ISREG(kind):
        # By its number: soundfile judges a file by the ending of its name, and fails for some of them.
        return open(os.open(source, os.O_RDONLY), "rb")
    if not stat.S_ISFIFO(kind):
        raise MossError(f"{name}: is neither a file nor a pipe, expected audio ({READABLE})")
    with open(source, "rb") as pipe:
        return _in_memory(pipe, name, max_bytes)


def _in_memory(file: IO[bytes], name: str, max_bytes: int) -> io.BytesIO:
    content = io.BytesIO()
    while piece := file.read(PIECE_BYTES):
        if not isinstance(piece, bytes | bytearray | memoryview):
            raise MossError(f"{name}: is open as text, expected a file opened in binary mode")
        content.write(piece)
        if content.tell() > max_bytes:
            raise too_large(name, max_bytes)
    content.seek(0)
    return content

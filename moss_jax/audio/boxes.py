"""Whether MP4 (m4a) and Matroska (WebM) files are whole: their nested sizes, compared with the bytes that are there.

FFmpeg reads a truncated file as a shorter recording.
"""

from typing import IO

from moss_jax.audio.source import bytes_at, is_file_start, joined, length_of, truncated
from moss_jax.errors import MossError

SEGMENT = 0x18538067
CLUSTER = 0x1F43B675
NESTED = (SEGMENT, CLUSTER)  # whose parts are checked; live recordings leave their sizes open


def check_mp4(file: IO[bytes], name: str) -> None:
    """Raises MossError for an MP4 file that is truncated or followed by another file."""
    length = length_of(file)
    place = 0
    while length - place >= 8:
        head = bytes_at(file, place, 16)
        if place and is_file_start(head):
            raise joined(name)
        size = int.from_bytes(head[:4], "big")
        kind = head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        elif size == 0 and any(kind):
            return  # to the end of the file
        if not any(head[:8]) or (place and not all(0x20 <= byte < 0x7F or byte == 0xA9 for byte in kind)):
            return  # padding, or something that is no box behind the last one
        if size < 8:
            raise MossError(f"{name}: damaged, a box of {size} bytes at byte {place}, expected a whole file")
        if size > length - place:
            raise truncated(name, f"{size - (length - place)} of {size} bytes of its part {_ascii(kind)} are missing")
        place += size
    if length - place > 0:
        raise truncated(name, "the file ends inside a header")


def check_matroska(file: IO[bytes], name: str) -> None:
    """Raises MossError for a Matroska or WebM file that is truncated or followed by another file."""
    length = length_of(file)
    place = 0
    while place < length:
        head = bytes_at(file, place, 16)
        if place and is_file_start(head):
            raise joined(name)
        element = _number(head, keep_mark=True)
        if element is None:
            if length - place >= 12:
                return  # something that is no element behind the last one
            raise truncated(name, "the file ends inside a header")
        identifier, width = element
        field = _number(head[width:], keep_mark=False)
        if field is None:
            raise truncated(name, "the file ends inside a header")
        size, field_width = field
        start = place + width + field_width
        is_open = size == (1 << 7 * field_width) - 1
        if identifier in NESTED:
            if not is_open and start + size > length:
                missing = start + size - length
                raise truncated(name, f"{missing} of {size} bytes of a WebM or Matroska part are missing")
            place = start  # the parts inside it follow
            continue
        if is_open:
            return
        if start + size > length:
            missing = start + size - length
            raise truncated(name, f"{missing} of {size} bytes of a WebM or Matroska part are missing")
        place = start + size


def _number(head: bytes, keep_mark: bool) -> tuple[int, int] | None:
    """A number of variable width at the start of `head`, and its width in bytes."""
    if not head or not head[0]:
        return None
    width = 9 - head[0].bit_length()
    if len(head) < width:
        return None
    number = int.from_bytes(head[:width], "big")
    return (number if keep_mark else number & ~(1 << 7 * width)), width


def _ascii(kind: bytes) -> str:
    return kind.decode("ascii", "replace")

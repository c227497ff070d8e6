"""The size fields of WAV, RF64, W64, AIFF, CAF and AU files, compared with the bytes that are there.

libsndfile reads a truncated file as a shorter recording, stops where a wrong size field says, and reads nothing where
a program that wrote to a pipe left the size at 0. `repaired` finds these cases before anything is decoded.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from moss_jax.audio.source import bytes_at, is_file_start, joined, length_of, too_large, truncated
from moss_jax.errors import MossError

# Programs that write to a pipe cannot know the size. They leave 0 there, or a number near 2**31, 2**32 or 2**63.
OPEN_SIZE = {4: 0x7FFF0000, 8: 1 << 62}  # by the bytes of the size field
# Chunks that programs add behind the samples. One that is itself cut off does not make the recording incomplete.
METADATA = (
    b"LIST",
    b"id3 ",
    b"ID3 ",
    b"bext",
    b"cue ",
    b"fact",
    b"JUNK",
    b"junk",
    b"PAD ",
    b"FLLR",
    b"smpl",
    b"inst",
    b"iXML",
    b"_PMX",
    b"acid",
    b"afsp",
    b"LGWV",
    b"PEAK",
    b"MARK",
    b"COMT",
    b"NAME",
    b"AUTH",
    b"ANNO",
    b"(c) ",
    b"APPL",
    b"INST",
    b"info",
    b"free",
    b"ovvw",
    b"uuid",
    b"umid",
    b"strg",
    b"mark",
    b"regn",
    b"midi",
    b"peak",
)
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")  # metadata that programs append to any file


@dataclass(frozen=True)
class Layout:
    """How a container arranges its chunks."""

    name: str
    magic: bytes  # the first bytes of the file
    forms: tuple[bytes, ...]  # what may be at byte 8
    first: int  # offset of the first chunk
    data: bytes  # identifier of the chunk with the samples
    size: str  # struct format of a size field
    align: int  # chunks start at multiples of this
    prefix: int = 0  # bytes of the data chunk before its samples
    header_counts: bool = False  # sizes include the identifier and the size field


W64_RIFF = b"riff.\x91\xcf\x11\xa5\xd6(\xdb\x04\xc1\0\0"
W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\0\xc0O\x8e\xdb\x8a"
LAYOUTS = (
    Layout("WAV", b"RIFF", (b"WAVE",), 12, b"data", "<I", align=2),
    Layout("WAV", b"RIFX", (b"WAVE",), 12, b"data", ">I", align=2),
    Layout("RF64", b"RF64", (b"WAVE",), 12, b"data", "<I", align=2),
    Layout("W64", W64_RIFF, (b"",), 40, W64_DATA, "<Q", align=8, header_counts=True),
    Layout("AIFF", b"FORM", (b"AIFF", b"AIFC"), 12, b"SSND", ">I", align=2, prefix=8),
    Layout("CAF", b"caff", (b"",), 8, b"data", ">Q", align=1, prefix=4),
)


@dataclass(frozen=True)
class SizeField:
    """A number in a header that says how many bytes of samples there are."""

    offset: int
    format: str  # of struct
    value: int
    extra: int = 0  # what the number in the file counts beyond `value`

    @property
    def is_open(self) -> bool:
        """Whether it is one of the values that mean: until the end of the file."""
        return self.value >= OPEN_SIZE[struct.calcsize(self.format)]


@dataclass(frozen=True)
class Chunk:
    """A chunk's identifier, the offset of its content and its size field."""

    name: bytes
    start: int
    size: SizeField


def repaired(file: IO[bytes], name: str, max_bytes: int) -> IO[bytes] | None:
    """The file as it can be decoded: `file` itself, or a copy in memory whose open size field is filled in.

    Args:
        file: seekable. None is returned unless it is a WAV, RF64, W64, AIFF, CAF or AU file.
        name: of the file, in errors.
        max_bytes: the most that is copied into memory.

    Raises:
        MossError: the file is truncated, its size field contradicts its length, or another file follows in it.
    """
    head = bytes_at(file, 0, 16)
    if head.startswith((b".snd", b"dns.")):
        return _repaired_au(file, head, name, max_bytes)
    layouts = (layout for layout in LAYOUTS if head.startswith(layout.magic) and head[8:].startswith(layout.forms))
    layout = next(layouts, None)
    if layout is None:
        return None
    found = {chunk.name: chunk for chunk in reversed(list(_until_data(file, layout)))}
    data = found.get(layout.data)
    if data is None:
        raise truncated(name, f"a {layout.name} file without samples")
    size = data.size
    ds64 = found.get(b"ds64")
    if layout.name == "RF64" and size.is_open and ds64 is not None:
        size = _size_field(file, ds64.start + 8, "<Q")
    end = data.start + size.value
    length = length_of(file)
    is_empty = size.value <= layout.prefix
    if is_empty and not _is_metadata(file, layout, end, length):
        return _filled_in(file, layout.magic, data.start, size, name, max_bytes)
    if size.is_open and end > length:
        return _filled_in(file, layout.magic, data.start, size, name, max_bytes)
    if end > length:
        raise truncated(name, f"{end - length} of {size.value} bytes of its samples are missing")
    if not _is_metadata(file, layout, end, length):
        raise _contradicted(file, end, size.value, name)
    if layout.name == "W64" and end < length:  # libsndfile reads what follows the samples as samples
        if length > max_bytes:
            raise too_large(name, max_bytes)
        return io.BytesIO(bytes_at(file, 0, end))
    return file


def _repaired_au(file: IO[bytes], head: bytes, name: str, max_bytes: int) -> IO[bytes]:
    order = ">" if head.startswith(b".snd") else "<"
    if len(head) < 16:
        raise truncated(name, "an AU file without samples")
    (start,) = struct.unpack_from(order + "I", head, 4)
    size = _size_field(file, 8, order + "I")
    length = length_of(file)
    end = start + size.value
    if size.is_open or (size.value == 0 and length > start):
        return _filled_in(file, head[:4], start, size, name, max_bytes)
    if end > length:
        raise truncated(name, f"{end - length} of {size.value} bytes of its samples are missing")
    if not _only_zeros(file, end) and not bytes_at(file, end, 16).startswith(TAGS):
        raise _contradicted(file, end, size.value, name)
    return file


def _size_field(file: IO[bytes], offset: int, kind: str, extra: int = 0) -> SizeField:
    raw = bytes_at(file, offset, struct.calcsize(kind))
    (value,) = struct.unpack(kind, raw) if len(raw) == struct.calcsize(kind) else (0,)
    return SizeField(offset, kind, max(0, value - extra), extra)


def _chunk(file: IO[bytes], layout: Layout, place: int) -> Chunk | None:
    width = len(layout.data)
    header = width + struct.calcsize(layout.size)
    head = bytes_at(file, place, header)
    if len(head) < header:
        return None
    size = _size_field(file, place + width, layout.size, header if layout.header_counts else 0)
    return Chunk(head[:width], place + header, size)


def _after(chunk: Chunk, layout: Layout) -> int:
    end = chunk.start + chunk.size.value
    return end + -end % layout.align


def _until_data(file: IO[bytes], layout: Layout) -> Iterator[Chunk]:
    """The chunks up to the one with the samples, as far as the size fields lead through the file."""
    chunk = _chunk(file, layout, layout.first)
    while chunk is not None:
        yield chunk
        if chunk.name == layout.data:
            return
        chunk = _chunk(file, layout, _after(chunk, layout))


def _is_metadata(file: IO[bytes], layout: Layout, end: int, length: int) -> bool:
    """Whether there is nothing but metadata and padding from `end`, where the samples end, to the end of the file."""
    # Some programs leave the padding byte out.
    return any(_is_chunks(file, layout, place, length) for place in {end + -end % layout.align, end})


def _is_chunks(file: IO[bytes], layout: Layout, place: int, length: int) -> bool:
    while (chunk := _chunk(file, layout, place)) is not None:
        head = bytes_at(file, place, 16)
        if is_file_start(head):
            return False
        if head.startswith(TAGS) or _only_zeros(file, place):
            return True
        if not all(0x20 <= byte < 0x7F for byte in chunk.name[:4]):
            return False
        if chunk.start + chunk.size.value > length:
            return chunk.name[:4] in METADATA
        place = _after(chunk, layout)
    return True


def _only_zeros(file: IO[bytes], place: int) -> bool:
    file.seek(place)
    while piece := file.read(2**16):
        if any(piece):
            return False
    return True


def _filled_in(file: IO[bytes], magic: bytes, start: int, size: SizeField, name: str, max_bytes: int) -> io.BytesIO:
    """A copy whose samples reach to the end of the file."""
    if length_of(file) > max_bytes:
        raise too_large(name, max_bytes)
    content = bytearray(bytes_at(file, 0, -1))
    # The samples of a first file end where the header of a second one begins.
    place = content.find(magic, start)
    while place >= 0:
        if len(magic) > 4 or content[place + 8 : place + 16] in (b"WAVEfmt ", b"WAVEJUNK", b"AIFFCOMM", b"AIFCFVER"):
            raise joined(name)
        place = content.find(magic, place + 1)
    struct.pack_into(size.format, content, size.offset, len(content) - start + size.extra)
    return io.BytesIO(content)


def _contradicted(file: IO[bytes], end: int, size: int, name: str) -> MossError:
    if any(is_file_start(bytes_at(file, place, 16)) for place in (end, end + 1)):
        return joined(name)
    return MossError(
        f"{name}: the header says {size} bytes of samples, but {length_of(file) - end} bytes follow that are no "
        "metadata; expected a header that fits the file (convert it with a program that ignores the header's size)"
    )

"""The frames of an MP3 file.

libsndfile believes the frame count in a Xing or Info header, and estimates the length of files without one from their
first frame: it would stop early in both cases where the file is longer, and joined files are longer than the header
of the first one says. Here the frames are counted, and every part of the file gets a header with the true count.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from moss_jax.audio.source import is_file_start, joined, truncated
from moss_jax.errors import MossError

SEARCH_BYTES = 2**16  # how far into a file the first frame may be
BITRATES = (
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2 and 2.5, kbit/s
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG 1
)
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by the version's code, Hz


@dataclass(frozen=True)
class Format:
    """What all frames of a recording have in common."""

    version: int  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    rate: int  # Hz
    channels: int

    @property
    def side_bytes(self) -> int:
        """Bytes between the header of a frame and its data."""
        if self.version == 3:
            return 17 if self.channels == 1 else 32
        return 9 if self.channels == 1 else 17

    def __str__(self) -> str:
        return f"{self.rate} Hz, {self.channels} channel{'s' if self.channels > 1 else ''}"


@dataclass
class _Link:
    """The frames from one Xing, Info or VBRI header to the next."""

    format: Format
    header: bytes = b""  # the Xing or Info frame
    promised: int = 0  # frames that the header says, 0 if it does not
    frames: int = 0
    parts: list[bytes] = field(default_factory=list)


def links(data: bytes, name: str) -> list[io.BytesIO]:
    """The recordings in an MP3 file one after the other (more than one where files were joined), each a whole MP3 file.

    Raises:
        MossError: there are fewer frames than a Xing, Info or VBRI header says, the sample rate or the number of
            channels changes, or a file of another kind follows.
    """
    found: list[_Link] = []
    end = 0
    for start, length, kind in _frames(data, name):
        if found and kind != found[0].format:
            raise MossError(
                f"{name}: changes from {found[0].format} to {kind} at byte {start}, expected one format (convert it)"
            )
        end = start + length
        frame = data[start:end]
        header = _header(frame, kind)
        if header is not None:
            link = _Link(kind, *header)
            found.append(link)
            continue
        if not found:
            found.append(_Link(kind))
        found[-1].frames += 1
        found[-1].parts.append(frame)
    is_open = end < len(data) and _frame(data, end) is not None  # the file ends inside a frame
    for link in found:
        missing = link.promised - link.frames
        # Some encoders count the frame of the header itself.
        if missing > 1 or (missing == 1 and is_open and link is found[-1]):
            raise truncated(name, f"{missing} of {link.promised} MP3 frames are missing")
    return [io.BytesIO(b"".join([_counted(link), *link.parts])) for link in found if link.frames]


def is_mp3(data: bytes) -> bool:
    """Whether frames of an MP3 file begin near the start of `data`."""
    return _synchronised(data, _skip_tags(data, 0), SEARCH_BYTES) is not None


def skip_id3(data: bytes, place: int = 0) -> int:
    """The offset behind the ID3v2 tags at `place`."""
    while data[place : place + 3] == b"ID3" and len(data) >= place + 10:
        size = 0
        for byte in data[place + 6 : place + 10]:
            size = size << 7 | byte & 0x7F
        place += 10 + size + (10 if data[place + 5] & 0x10 else 0)
    return place


def _skip_tags(data: bytes, place: int) -> int:
    while True:
        start = place
        place = skip_id3(data, place)
        if data[place : place + 3] == b"TAG":
            place += 128
        if data[place : place + 8] == b"APETAGEX":
            place += 32 + int.from_bytes(data[place + 12 : place + 16], "little")
        if place == start:
            return place


def _frames(data: bytes, name: str) -> Iterator[tuple[int, int, Format]]:
    """Offset, length and format of every whole frame."""
    place: int | None = _synchronised(data, _skip_tags(data, 0), SEARCH_BYTES)
    while place is not None:
        found = _frame(data, place)
        if found is not None:
            if place + found[0] > len(data):
                return
            yield place, *found
            place += found[0]
            continue
        place = _skip_tags(data, place)
        if is_file_start(data[place : place + 16]):
            raise joined(name)
        place = _synchronised(data, place, len(data))


def _synchronised(data: bytes, place: int, limit: int) -> int | None:
    """The first offset from `place` on at which three frames of one format, or all that are left, follow each other."""
    stop = place + limit
    while (place := data.find(b"\xff", place, stop)) >= 0:
        first = _frame(data, place)
        if first is not None:
            end = place
            for _ in range(3):
                found = _frame(data, end)
                if found is None or found[1] != first[1]:
                    break
                end += found[0]
            else:
                return place
            if end > place and (end >= len(data) or _skip_tags(data, end) >= len(data)):
                return place
        place += 1
    return None


def _frame(data: bytes, place: int) -> tuple[int, Format] | None:
    """Length and format of the frame at `place`, or None."""
    if data[place : place + 1] != b"\xff" or len(data) < place + 4:
        return None
    return _parsed(int.from_bytes(data[place : place + 4], "big"))


@lru_cache(maxsize=4096)
def _parsed(header: int) -> tuple[int, Format] | None:
    version = header >> 19 & 3
    layer = header >> 17 & 3
    bitrate = header >> 12 & 15
    rate = header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        return None
    kind = Format(version, RATES[version][rate], 1 if header >> 6 & 3 == 3 else 2)
    samples = 144 if version == 3 else 72
    return samples * BITRATES[version == 3][bitrate] * 1000 // kind.rate + (header >> 9 & 1), kind


def _header(frame: bytes, kind: Format) -> tuple[bytes, int] | None:
    """The frame to put in front of a link and the frames it promises, for a frame that is a header; else None."""
    tag = 4 + kind.side_bytes
    if frame[36:40] == b"VBRI":
        return b"", int.from_bytes(frame[50:54], "big")
    if frame[tag : tag + 4] not in (b"Xing", b"Info") or any(frame[4:tag]):
        return None
    if not frame[tag + 7] & 1:
        return b"", 0
    return frame, int.from_bytes(frame[tag + 8 : tag + 12], "big")


def _counted(link: _Link) -> bytes:
    """An Info frame with the true number of frames."""
    tag = 4 + link.format.side_bytes
    frame = bytearray(link.header)
    if not frame:
        # The header of the first frame, without a checksum and with the largest bit rate, so that the tag has room.
        header = int.from_bytes(link.parts[0][:4], "big") | 1 << 16
        header = header & ~0xF000 | 14 << 12
        length, _ = _parsed(header) or (0, None)
        frame = bytearray(length)
        frame[:4] = header.to_bytes(4, "big")
        frame[tag : tag + 8] = b"Info\0\0\0\1"
    frame[tag + 8 : tag + 12] = link.frames.to_bytes(4, "big")
    return bytes(frame)

"""The number of samples of a FLAC file, from its last frame instead of its header.

Encoders that write to a pipe leave the number in the header at 0, which libsndfile cannot read to the end.
"""

import io
import re

from moss_jax.audio.source import joined, truncated
from moss_jax.errors import MossError

TOTAL = slice(21, 26)  # where the header has the number, in 36 bits
MAX_FRAME_BYTES = 2**21  # how far from the end the last frame is searched
ID3V1_BYTES = 128
OTHER_FILES = rb"RIFF....WAVE|RF64....WAVE|FORM....AIF[FC]|OggS\0\x02|....ftyp(M4A|mp4|iso)|\x1aE\xdf\xa3.{4,40}webm"


def repaired(data: bytes, name: str) -> io.BytesIO:
    """A FLAC file whose header has the number of samples that the last frame implies.

    Args:
        data: the file, from its mark `fLaC` on.
        name: of the file, in errors.

    Raises:
        MossError: the file is truncated, the header contradicts the last frame, or another file follows in it.
    """
    if len(data) < 42:
        raise truncated(name, "the header is incomplete")
    if any(data.find(b"fLaC" + last + b"\0\0\x22", 4) >= 0 for last in (b"\0", b"\x80")):
        raise joined(name)
    promised = int.from_bytes(data[TOTAL], "big") & (1 << 36) - 1
    found = _samples(data)
    if found is None:
        if not promised:
            raise truncated(name, "the last frame is incomplete")
        if re.search(OTHER_FILES, data[42:], re.DOTALL):
            raise joined(name)
        return io.BytesIO(data)  # truncated, or something follows the last frame: the decoder finds out
    if promised > found:
        raise truncated(name, f"{promised - found} of {promised} samples are missing")
    if 0 < promised < found:
        raise MossError(f"{name}: the header says {promised} samples, but the file holds {found}; convert it again")
    content = bytearray(data)
    content[TOTAL] = (int.from_bytes(data[TOTAL], "big") >> 36 << 36 | found).to_bytes(5, "big")
    return io.BytesIO(content)


def _samples(data: bytes) -> int | None:
    """The number of samples up to the end of the last frame; None where no whole frame ends the file."""
    end = len(data)
    if data[-ID3V1_BYTES:].startswith(b"TAG"):
        end -= ID3V1_BYTES
    end = len(data[:end].rstrip(b"\0")) if data[end - 2 : end] == b"\0\0" else end
    block = int.from_bytes(data[8:10], "big")
    place = end
    while (place := data.rfind(b"\xff", max(42, end - MAX_FRAME_BYTES), place)) >= 0:
        samples = _frame_end(data, place, block)
        if samples is not None and _crc16(data[place:end]) == 0:
            return samples
    return None


def _frame_end(data: bytes, place: int, block: int) -> int | None:
    """The number of samples up to the end of the frame at `place`; None if no frame header is there."""
    head = data[place : place + 16]
    if len(head) < 16 or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    size_code = head[2] >> 4
    rate_code = head[2] & 15
    if size_code == 0 or rate_code == 15:
        return None
    # The number of the frame or of its first sample is written as in UTF-8.
    extra = 0
    while extra < 7 and head[4] >> (7 - extra) & 1:
        extra += 1
    extra = max(0, extra - 1)
    number = head[4] & (0x7F if extra == 0 else 0x3F >> extra)
    for byte in head[5 : 5 + extra]:
        number = number << 6 | byte & 0x3F
    after = 5 + extra
    if size_code in (6, 7):
        width = size_code - 5
        size = int.from_bytes(head[after : after + width], "big") + 1
        after += width
    else:
        size = 192 if size_code == 1 else 576 << (size_code - 2) if size_code < 6 else 256 << (size_code - 8)
    after += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if after >= len(head) or _crc8(head[:after]) != head[after]:
        return None
    return size + (number if head[1] & 1 else number * block)


def _table(polynomial: int, bits: int) -> list[int]:
    top = 1 << (bits - 1)
    table = []
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = (value << 1 ^ polynomial if value & top else value << 1) & (top * 2 - 1)
        table.append(value)
    return table


_TABLE_8 = _table(0x07, 8)
_TABLE_16 = _table(0x8005, 16)


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value = _TABLE_8[value ^ byte]
    return value


def _crc16(data: bytes) -> int:
    """The checksum of a frame; 0 for a frame with its checksum behind it."""
    value = 0
    for byte in data:
        value = (value << 8 & 0xFF00) ^ _TABLE_16[value >> 8 ^ byte]
    return value

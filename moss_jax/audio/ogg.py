"""The logical streams of an Ogg file. Files may follow each other in one ("chaining"); libsndfile reads the first."""

from dataclasses import dataclass

from moss_jax.audio.source import truncated
from moss_jax.errors import MossError

HEADER_BYTES = 27
FIRST_PAGE = 0x02  # flags of a page
LAST_PAGE = 0x04


@dataclass
class _Link:
    start: int
    end: int = 0
    open: int = 0  # streams that have started and not ended
    only_starts: bool = True


def links(data: bytes, name: str) -> list[bytes]:
    """The parts of a chained Ogg file, each an Ogg file of its own; one for an ordinary file.

    Raises:
        MossError: a page is incomplete, or the last page of a stream is missing.
    """
    found: list[_Link] = []
    place = 0
    while len(data) - place >= HEADER_BYTES:
        if data[place : place + 4] != b"OggS":
            if not any(data[place:]) or data.startswith((b"TAG", b"ID3", b"APETAGEX"), place):
                break
            raise MossError(f"{name}: damaged, {len(data) - place} bytes behind byte {place} are not Ogg")
        flags = data[place + 5]
        body = place + HEADER_BYTES + data[place + 26]
        end = body + sum(data[place + HEADER_BYTES : body])
        if end > len(data) or body > len(data):
            raise truncated(name, "its last page is incomplete")
        if flags & FIRST_PAGE:
            if not found or not found[-1].only_starts:
                found.append(_Link(place))
            found[-1].open += 1
        elif found:
            found[-1].only_starts = False
        else:
            raise MossError(f"{name}: damaged, the first page of the Ogg file is missing, expected a whole file")
        if flags & LAST_PAGE:
            found[-1].open -= 1
            found[-1].only_starts = False
        found[-1].end = end
        place = end
    if place < len(data) and data.startswith(b"OggS"[: len(data) - place], place):
        raise truncated(name, "its last page is incomplete")
    if any(link.open > 0 for link in found):
        raise truncated(
            name,
            "the last page of the Ogg stream is missing (`ffmpeg -i OLD -c copy NEW` mends a file known to be whole)",
        )
    return [data[link.start : link.end] for link in found]

"""Recordings from files: containers of every kind to mono samples, block by block.

libsndfile (by soundfile, which is always installed) decodes all containers that it knows. FFmpeg (by PyAV, which the
extra `m4a` brings) decodes MP4 and Matroska only. Neither of them reports a truncated file reliably, and libsndfile
believes wrong lengths in headers, so the structure of every file is checked first.
"""

import contextlib
import io
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from moss_jax.audio import boxes, chunks, flac, mpeg, ogg
from moss_jax.audio.recording import MAX_BYTES, Recording, as_rate, mixed
from moss_jax.audio.source import (
    EBML,
    READABLE,
    Source,
    bytes_at,
    is_file_start,
    length_of,
    open_source,
    source_name,
    too_large,
    truncated,
)
from moss_jax.errors import MossError

if TYPE_CHECKING:
    import av
    import soundfile

BLOCK_VALUES = 2**19  # samples of all channels decoded at a time


def load_audio(source: Source) -> tuple[np.ndarray, int]:
    """`read_audio` without its limits and notices: (wave float32 [samples], its sample rate in Hz)."""
    recording = read_audio(source)
    return recording.wave, recording.rate


def read_audio(
    source: Source, *, max_bytes: int = MAX_BYTES, max_seconds: float | None = None, name: str | None = None
) -> Recording:
    """Reads a recording of any rate from 1 to 768 kHz, any sample width and any number of channels.

    Args:
        source: the path of a file or a pipe, "-" for standard input, or a binary file object. READABLE names the
            containers; m4a and webm need the extra `moss-jax[m4a]`.
        max_bytes: the most decoded samples, counted as 4 bytes for each sample of each channel. The memory that is
            used at the same time is about that of the mono wave.
        max_seconds: the longest recording, s.
        name: of the recording in errors and notices; None for that of the source.

    Raises:
        MossError: the source is missing, a folder or a device, is no audio, is truncated, damaged or several files in
            one, holds no samples or samples that are NaN, infinite or far above 1, exceeds a limit, has a rate outside
            1 to 768 kHz, or needs PyAV, which is not installed.
    """
    name = source_name(source) if name is None else name
    with open_source(source, name, max_bytes) as file:
        decoder = _decoder(file, name, max_bytes)
        return mixed(decoder.blocks, as_rate(decoder.rate, name), name, max_bytes, max_seconds)


def audio_length(source: Source) -> tuple[int, int]:
    """(number of samples, sample rate in Hz) of a recording; only m4a and webm are decoded for it.

    Raises:
        MossError: as `read_audio`, as far as the structure of the file shows it.
    """
    name = source_name(source)
    with open_source(source, name, MAX_BYTES) as file:
        decoder = _decoder(file, name, MAX_BYTES)
        count = decoder.count
        if count is None:
            count = sum(len(block) for block in decoder.blocks())
        return count, as_rate(decoder.rate, name)


@dataclass(frozen=True)
class Decoder:
    """A file that is ready to be decoded.

    Attributes:
        rate: samples per second, Hz.
        count: samples of each channel; None where only decoding shows it.
        blocks: decodes from the start, float32 [T, channels] at a time.
    """

    rate: int
    count: int | None
    blocks: Callable[[], Iterable[np.ndarray]]


def _decoder(file: IO[bytes], name: str, max_bytes: int) -> Decoder:
    head = bytes_at(file, 0, 16)
    if head[4:8] == b"ftyp":
        return _ffmpeg(file, "mp4", boxes.check_mp4, name)
    if head.startswith(EBML):
        return _ffmpeg(file, "matroska", boxes.check_matroska, name)
    with_sizes = chunks.repaired(file, name, max_bytes)
    if with_sizes is not None:
        return _sndfile([with_sizes], name)
    is_tagged = head.startswith(b"ID3")
    if is_tagged or head.startswith((b"fLaC", b"OggS")) or mpeg.is_mp3(bytes_at(file, 0, 2**18)):
        if length_of(file) > max_bytes:
            raise too_large(name, max_bytes)
        data = bytes_at(file, 0, -1)
        behind = mpeg.skip_id3(data)
        if is_tagged and is_file_start(data[behind : behind + 16]):
            return _decoder(io.BytesIO(data[behind:]), name, max_bytes)
        if head.startswith(b"fLaC"):
            return _sndfile([flac.repaired(data, name)], name)
        if head.startswith(b"OggS"):
            return _sndfile([io.BytesIO(part) for part in ogg.links(data, name)], name)
        if mpeg.is_mp3(data):
            return _sndfile(list(mpeg.links(data, name)), name)
    raise MossError(f"{name}: not an audio file (format not recognised), expected {READABLE}")


def _sndfile(parts: Sequence[IO[bytes]], name: str) -> Decoder:
    """Decodes files that are one recording together, by libsndfile."""
    import soundfile

    if not parts:
        raise MossError(f"{name}: holds 0 samples, expected at least one")
    count = 0
    for part in reversed(parts):
        with _open_sndfile(part, name) as file:
            rate = file.samplerate
            channels = file.channels
            count += file.frames

    def blocks() -> Iterator[np.ndarray]:
        for part in parts:
            with _open_sndfile(part, name) as file:
                if (file.samplerate, file.channels) != (rate, channels):
                    raise MossError(
                        f"{name}: changes from {rate} Hz with {channels} channels to {file.samplerate} Hz with "
                        f"{file.channels} in a later part, expected one format (convert it)"
                    )
                missing = file.frames
                while missing:
                    try:
                        block = file.read(max(1, BLOCK_VALUES // channels), dtype="float32", always_2d=True)
                    except soundfile.SoundFileError as error:
                        raise MossError(
                            f"{name}: damaged or cut short ({_reason(error)}), expected a whole file"
                        ) from error
                    if not len(block):
                        raise truncated(name, f"{missing} of {file.frames} samples are missing")
                    missing -= len(block)
                    yield block

    return Decoder(rate, count, blocks)


def _open_sndfile(part: IO[bytes], name: str) -> "soundfile.SoundFile":
    import soundfile

    part.seek(0)
    try:
        return soundfile.SoundFile(part)
    except soundfile.SoundFileError as error:
        raise MossError(f"{name}: not an audio file ({_reason(error)}), expected {READABLE}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).removeprefix("Error :").strip().rstrip(".").lower()


def _ffmpeg(file: IO[bytes], container: str, check: Callable[[IO[bytes], str], None], name: str) -> Decoder:
    """Decodes the first audio track of a file, by FFmpeg. `container` is FFmpeg's name of the demultiplexer."""
    try:
        import av
    except ImportError as error:
        kind = "m4a" if container == "mp4" else "webm"
        raise MossError(f"{name}: reading {kind} needs PyAV: pip install 'moss-jax[m4a]'") from error
    check(file, name)

    def frames() -> Generator["av.AudioFrame", None, None]:
        file.seek(0)
        try:
            # Bytes in tags that are not UTF-8 are an error in PyAV before 19, unless it is asked to replace them.
            tags: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
            with av.open(file, "r", container, **tags) as opened:
                if not opened.streams.audio:
                    raise MossError(f"{name}: has no audio track")
                planar = av.AudioResampler(format="fltp")  # the rate and the channels stay as they are
                for frame in itertools.chain(opened.decode(opened.streams.audio[0]), (None,)):
                    yield from (part for part in planar.resample(frame) if part is not None and part.samples)
        except MossError:  # a ValueError, too
            raise
        except (av.FFmpegError, ValueError, OverflowError) as error:
            reason = str(getattr(error, "strerror", None) or error).lower()
            raise MossError(f"{name}: damaged or cut short ({reason}), expected a whole file") from error

    def blocks() -> Iterator[np.ndarray]:
        for frame in frames():
            yield frame.to_ndarray().T

    with contextlib.closing(frames()) as first:
        rate = next((frame.sample_rate for frame in first), None)
    if rate is None:
        raise MossError(f"{name}: holds 0 samples, expected at least one")
    return Decoder(rate, None, blocks)

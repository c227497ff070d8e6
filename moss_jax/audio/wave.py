"""Waves on their way in and out: load, save, resample, cut into segments.

A wave is float32 [samples], mono, in [-1, 1].
"""

import math
import os
import struct
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from moss_jax.errors import MossError

READABLE = "wav, flac, mp3, ogg or m4a"
WRITABLE = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16")}


def load_audio(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """Reads a recording of any rate, sample width and channel count.

    Args:
        path: a wav, flac, mp3, ogg or m4a file. m4a needs the extra `moss-jax[m4a]`.

    Returns:
        (wave float32 [samples], the mean of the channels; its sample rate in Hz)

    Raises:
        MossError: the file is missing, is a folder, is no audio, is cut short, holds no samples or holds NaN or
            infinite samples, or PyAV is needed and not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise MossError(f"{path}: is a folder, expected an audio file ({READABLE})")
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except FileNotFoundError as error:
        raise MossError(f"{path}: no such file") from error
    except OSError as error:
        raise MossError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise MossError(f"{path}: the file is empty, expected audio ({READABLE})")
    channels, rate = _read_mp4(path) if head[4:8] == b"ftyp" else _read_sndfile(path)
    if channels.shape[0] == 0:
        raise MossError(f"{path}: holds 0 samples, expected at least one")
    wave = channels[:, 0] if channels.shape[1] == 1 else channels.mean(1, dtype=np.float32)
    if not np.isfinite(wave).all():
        first = int(np.argmin(np.isfinite(wave)))
        raise MossError(f"{path}: sample {first} is NaN or infinite, expected finite numbers")
    return np.ascontiguousarray(wave), rate


def _read_sndfile(path: Path) -> tuple[np.ndarray, int]:
    import soundfile

    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise MossError(f"{path}: not an audio file ({_reason(error)}), expected {READABLE}") from error
    with file:
        promised, estimated = file.frames, "MPEG" in file.format_info
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise MossError(f"{path}: damaged or cut short ({_reason(error)}), expected a whole file") from error
        missing = promised - len(samples)
        if missing > (4 * 1152 if estimated else 0):  # some MP3 headers only estimate the length
            raise MossError(f"{path}: cut short, {missing} of {promised} samples are missing, expected a whole file")
        if file.format == "WAV" and (absent := _absent_bytes(path)) > 0:
            raise MossError(f"{path}: cut short, {absent} bytes of its samples are missing, expected a whole file")
        return samples, file.samplerate


def _reason(error) -> str:
    reason = str(error.error_string).removeprefix("Error :").strip().rstrip(".").lower()
    return "format not recognised" if "regular file" in reason else reason  # said of an .mp3 without a frame


def _absent_bytes(path: Path) -> int:
    """How many bytes of a wav file's samples lie behind its end; libsndfile reads a cut file without a word.

    Programs that write to a pipe cannot know the size and put one near 2**31 or 2**32 there: nothing is absent then.
    """
    size, place = path.stat().st_size, 12
    with path.open("rb") as file:
        while place + 8 <= size:
            file.seek(place)
            name, length = struct.unpack("<4sI", file.read(8))
            if name == b"data":
                return place + 8 + length - size if length < 0x7FFF0000 else 0
            place += 8 + length + length % 2
    return 0


def _read_mp4(path: Path) -> tuple[np.ndarray, int]:
    try:
        import av
    except ImportError as error:
        raise MossError(f"{path}: reading m4a needs PyAV: pip install 'moss-jax[m4a]'") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise MossError(f"{path}: has no audio track")
            stream = container.streams.audio[0]
            planar = av.AudioResampler(format="fltp")  # only the sample format changes, not the rate or the layout
            frames = [part for frame in container.decode(stream) for part in planar.resample(frame)]
            frames += planar.resample(None)
            rate = stream.codec_context.sample_rate
            parts = [frame.to_ndarray() for frame in frames if frame is not None and frame.samples]
    except av.FFmpegError as error:
        raise MossError(f"{path}: damaged or cut short ({error.strerror.lower()}), expected a whole file") from error
    return (np.concatenate(parts, 1).T if parts else np.zeros((0, 1), np.float32)), rate


def save_audio(path: str | os.PathLike, wave: np.ndarray, rate: int) -> None:
    """Writes a wave as 16-bit wav or flac, by the ending of `path`: whole, or not at all.

    Args:
        wave: float [samples]; what lies outside [-1, 1] is clipped.
        rate: samples a second, Hz.

    Raises:
        MossError: the ending is another one, the wave holds NaN or infinite samples, or the place cannot be written.
    """
    import soundfile

    path, wave = Path(path), np.asarray(wave, np.float32)
    if path.suffix.lower() not in WRITABLE:
        raise MossError(f"{path}: cannot write {path.suffix or 'a file without an ending'}, expected .wav or .flac")
    if not np.isfinite(wave).all():
        raise MossError(f"{path}: not written, the wave holds NaN or infinite samples")
    container, subtype = WRITABLE[path.suffix.lower()]
    partial = None
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        soundfile.write(partial, np.clip(wave, -1, 1), rate, format=container, subtype=subtype)
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
        partial = None
    except (OSError, soundfile.LibsndfileError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MossError(f"{path}: cannot be written ({reason})") from error
    finally:
        if partial is not None:
            os.unlink(partial)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def segments(wave: np.ndarray, samples: int) -> list[np.ndarray]:
    """Consecutive pieces of `samples` samples, the last one shorter; none when the wave is empty."""
    return [wave[start : start + samples] for start in range(0, len(wave), samples)]


def resample(wave, from_rate: int, to_rate: int, *, lowpass_filter_width: int = 6, rolloff: float = 0.99):
    """Hann-windowed sinc resampling, as torchaudio's `transforms.Resample` does it by default.

    A numpy wave is resampled by numpy (nothing is compiled, whatever its length), a jax one by jax, also under jit.

    Args:
        wave: float32 [..., L].
        from_rate, to_rate: Hz.
        lowpass_filter_width: zero crossings of the sinc on each side.
        rolloff: cut-off, as a share of the lower Nyquist frequency.

    Returns:
        float32 [..., L'], L' = ceil(float32(to_rate * L / from_rate)): the quotient is rounded to float32 first, as
        there, so a long wave can be one sample shorter than the exact ceiling.
    """
    if from_rate <= 0 or to_rate <= 0:
        raise MossError(f"cannot resample from {from_rate} Hz to {to_rate} Hz: rates are positive whole numbers")
    divisor = math.gcd(from_rate, to_rate)
    old, new = from_rate // divisor, to_rate // divisor
    if old == new:
        return wave
    if isinstance(wave, np.ndarray):
        xp, wave = np, wave.astype(np.float32, copy=False)
        matmul = np.matmul
    else:
        import jax
        import jax.numpy as xp

        def matmul(a, b):
            return xp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    kernel, width, block = _resample_kernel(old, new, lowpass_filter_width, rolloff)
    length, taps = wave.shape[-1], len(kernel)
    out_length = math.ceil(np.float32(new * length / old))
    blocks, neighbours = -(-(length + 1) // block), -(-taps // block)  # a block of input gives kernel.shape[1] outputs
    right = (blocks + neighbours) * block - width - length
    wave = xp.pad(wave, [(0, 0)] * (wave.ndim - 1) + [(width, right)]).reshape(*wave.shape[:-1], -1, block)
    windows = xp.concatenate([wave[..., k : k + blocks, :] for k in range(neighbours)], -1)[..., :taps]
    return matmul(windows, kernel).reshape(*wave.shape[:-2], -1)[..., :out_length]


@lru_cache(maxsize=32)
def _resample_kernel(old: int, new: int, zeros: int, rolloff: float) -> tuple[np.ndarray, int, int]:
    """(kernel float32 [taps, outputs], left padding, input samples a block).

    The published kernel turns `old` samples into `new`; here as many such steps as make a block of some hundred samples
    stand side by side in one banded matrix, so that the windows overlap little.
    """
    base = rolloff * min(old, new)
    width = math.ceil(zeros * old / base)
    tap, phase = np.arange(-width, width + old) / old, np.arange(new)[:, None] / new
    t = np.clip(base * (tap - phase), -zeros, zeros)
    kernel = (base / old * np.sinc(t) * np.cos(np.pi * t / (2 * zeros)) ** 2).astype(np.float32)
    steps = max(1, -(-4 * width // old))
    banded = np.zeros((2 * width + steps * old, steps, new), np.float32)
    for step in range(steps):
        banded[step * old : step * old + kernel.shape[1], step] = kernel.T
    return banded.reshape(len(banded), steps * new), width, steps * old

"""What every recording must be before anything else sees it: mono, finite, on a scale of 1, at a sensible rate."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moss_jax.audio.source import too_large
from moss_jax.errors import MossError

MIN_RATE = 1_000  # Hz
MAX_RATE = 768_000
MAX_BYTES = 2 * 2**30  # of decoded samples, 4 bytes for each sample of each channel
MAX_CHANNELS = 64  # of an array
# Samples reach about 1. A mix may exceed it a little; what exceeds it by more than 20 dB has another scale.
MAX_SAMPLE = 10.0
SCALES = {"int8": 2.0**7, "uint8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}
# Channels cancel if their mean has 10 dB less power than one of them alone would leave in it.
CANCELLED = 0.1


@dataclass(frozen=True, eq=False)
class Recording:
    """A recording as the models take it.

    Attributes:
        wave: float32 [samples], mono, finite, full scale is 1.
        rate: samples per second, Hz.
        notices: one line for each thing that the person should know.
    """

    wave: np.ndarray
    rate: int
    notices: tuple[str, ...] = ()


def as_recording(samples: np.ndarray, rate: Any, what: str = "audio") -> Recording:
    """A recording from an array.

    Args:
        samples: [T], [T, channels] or [channels, T], at least one; the longer axis is time. Floats whose full scale
            is 1, or int8, uint8 (silence is 128), int16 or int32, which are converted by their scale.
        rate: samples per second, Hz: a whole number, as an integer, a float or a string.
        what: the name of the recording in errors and notices.

    Raises:
        MossError: the array has another shape or dtype, is empty, has another scale or holds NaN or infinite samples,
            or the rate is not a whole number from 1000 to 768000.
    """
    rate = as_rate(rate, what)
    samples = np.asarray(samples)
    shape = list(samples.shape)
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T
    if samples.ndim == 1:
        samples = samples[:, None]
    is_shape = samples.ndim == 2 and samples.shape[1] > 0
    if not is_shape or samples.shape[1] > MAX_CHANNELS or 1 < samples.shape[1] == samples.shape[0]:
        raise MossError(f"{what}: the array has shape {shape}, expected [T], [T, channels] or [channels, T]")
    if samples.dtype.name in SCALES:
        if samples.dtype == np.uint8:
            samples = samples.astype(np.int16) - 128
            samples = samples.astype(np.float32) / np.float32(SCALES["uint8"])
        else:
            samples = samples.astype(np.float32) / np.float32(SCALES[samples.dtype.name])
    elif not np.issubdtype(samples.dtype, np.floating):
        raise MossError(
            f"{what}: the array has dtype {samples.dtype}, expected floats from -1 to 1, int8, uint8, int16 or int32"
        )
    return mixed(lambda: [samples], rate, what, MAX_BYTES)


def as_rate(rate: Any, what: str = "audio") -> int:
    """A sample rate in Hz, from an integer, a float or a string.

    Raises:
        MossError: it is not a whole number from 1000 to 768000.
    """
    try:
        if isinstance(rate, bool | np.bool_):
            raise ValueError
        number = float(rate)
        whole = int(number)
    except (TypeError, ValueError, OverflowError):
        raise MossError(f"{what}: the sample rate is {rate!r:.40}, expected a whole number of Hz") from None
    if whole != number:
        raise MossError(f"{what}: the sample rate is {rate!r:.40}, expected a whole number of Hz")
    if not MIN_RATE <= whole <= MAX_RATE:
        raise MossError(f"{what}: the sample rate is {whole} Hz, expected {MIN_RATE} to {MAX_RATE} Hz")
    return whole


def mixed(
    blocks: Callable[[], Iterable[np.ndarray]], rate: int, what: str, max_bytes: int, max_seconds: float | None = None
) -> Recording:
    """The mean of the channels; where they cancel each other, the loudest channel.

    Args:
        blocks: returns the samples from the start, floats [T, channels] at a time; called once or twice.
        rate: samples per second, Hz.
        what: the name of the recording in errors and notices.
        max_bytes: the most samples, counted as 4 bytes for each sample of each channel.
        max_seconds: the longest recording, s.

    Raises:
        MossError: there are no samples, too many, NaN or infinite ones, or ones far above 1.
    """
    # A bytearray grows in place, so that no more than the mono wave and one block are in memory.
    content = bytearray()
    count = 0
    channels = 0
    sums: np.ndarray | None = None
    powers: np.ndarray | None = None
    for block in blocks():
        block = _checked(block, count, what)
        channels = block.shape[1]
        count += len(block)
        if count * channels * 4 > max_bytes:
            raise too_large(what, max_bytes)
        if max_seconds is not None and count > max_seconds * rate:
            raise MossError(f"{what}: longer than {max_seconds:g} s, expected a recording of at most {max_seconds:g} s")
        mono = block[:, 0] if channels == 1 else block.mean(1, dtype=np.float32)
        content += np.ascontiguousarray(mono).data
        if channels > 1:
            both = np.concatenate([block, mono[:, None]], 1)
            sums = both.sum(0, dtype=np.float64) + (0 if sums is None else sums)
            powers = np.square(both, dtype=np.float64).sum(0) + (0 if powers is None else powers)
    if not count:
        raise MossError(f"{what}: holds 0 samples, expected at least one")
    if sums is not None and powers is not None:
        variance = powers / count - np.square(sums / count)  # a constant offset does not count
        loudest = int(variance[:-1].argmax())
        if variance[-1] < CANCELLED * variance[loudest] / channels**2:
            content = bytearray()
            for block in blocks():
                content += np.ascontiguousarray(block[:, loudest], np.float32).data
            notice = f"{what}: its {channels} channels cancel each other; channel {loudest + 1} is used in their place"
            return Recording(np.frombuffer(content, np.float32), rate, (notice,))
    return Recording(np.frombuffer(content, np.float32), rate)


def _checked(block: np.ndarray, place: int, what: str) -> np.ndarray:
    """A block as float32, if its samples are finite and not far above 1."""
    peak = float(np.abs(block).max()) if block.size else 0.0
    if not np.isfinite(peak):
        first = place + int(np.argmin(np.isfinite(block).all(1)))
        raise MossError(f"{what}: sample {first} is NaN or infinite, expected finite numbers")
    if peak > MAX_SAMPLE:
        divisor = next((scale for scale in (2**15, 2**23, 2**31) if peak <= scale), None)
        hint = f"; divide them by {divisor} if they are integers of {divisor.bit_length()} bits" if divisor else ""
        raise MossError(f"{what}: its samples reach {peak:.6g}, expected -1 to 1{hint}")
    return block.astype(np.float32, copy=False)

"""Resampling by a windowed sinc, as torchaudio's `transforms.Resample` does it by default."""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from moss_jax.audio.recording import MAX_RATE
from moss_jax.errors import MossError

# The dense kernel for jax waves has about this many values at most: 44100 -> 16000 Hz has 110,000.
MAX_DENSE = 2**24


def resample(wave: Any, from_rate: int, to_rate: int, *, lowpass_filter_width: int = 6, rolloff: float = 0.99) -> Any:
    """Changes the sample rate of a wave.

    A numpy wave of any rate is resampled by scipy's polyphase filter: time and memory are linear in its length, and
    nothing is compiled. A jax wave is resampled by one matrix product, also under jit, for common ratios of rates.

    Args:
        wave: float32 [..., L].
        from_rate, to_rate: Hz, at most 768000.
        lowpass_filter_width: zero crossings of the sinc on each side.
        rolloff: cut-off, as a share of the lower Nyquist frequency.

    Returns:
        float32 [..., L'], L' = ceil(float32(to_rate * L / from_rate)): the quotient is rounded to float32 first, as
        in torchaudio, so a long wave can be one sample shorter than the exact ceiling.

    Raises:
        MossError: a rate is not positive or above 768 kHz, or the ratio is too unusual for a jax wave.
    """
    if not (0 < from_rate <= MAX_RATE and 0 < to_rate <= MAX_RATE):
        raise MossError(
            f"cannot resample from {from_rate} Hz to {to_rate} Hz: rates are positive whole numbers up to {MAX_RATE}"
        )
    divisor = math.gcd(from_rate, to_rate)
    old = from_rate // divisor
    new = to_rate // divisor
    if old == new:
        return wave
    length = math.ceil(np.float32(new * wave.shape[-1] / old))
    if not isinstance(wave, np.ndarray):
        return _resampled_jax(wave, old, new, length, lowpass_filter_width, rolloff)
    if not wave.size:
        return np.zeros((*wave.shape[:-1], length), np.float32)
    from scipy.signal import upfirdn

    kernel, center = _kernel(old, new, lowpass_filter_width, rolloff)
    # Output i of upfirdn is for the time i * old of the upsampled wave, `center` later than ours.
    first = center // old
    out = upfirdn(kernel, wave.astype(np.float32, copy=False), new, old, axis=-1)
    return np.ascontiguousarray(out[..., first : first + length])


@lru_cache(maxsize=16)
def _kernel(old: int, new: int, zeros: int, rolloff: float) -> tuple[np.ndarray, int]:
    """The filter at the rate of the upsampled wave, float32 [2 * center + 1], and its center, a multiple of `old`."""
    base = rolloff * min(old, new)
    support = math.floor(zeros * old * new / base)
    center = -(-max(support, new) // old) * old
    t = np.minimum(base / (old * new) * np.arange(center + 1), zeros)
    half = (base / old * np.sinc(t) * np.cos(np.pi / (2 * zeros) * t) ** 2).astype(np.float32)
    return np.concatenate([half[:0:-1], half]), center


def _resampled_jax(wave: Any, old: int, new: int, length: int, zeros: int, rolloff: float) -> Any:
    import jax
    import jax.numpy as jnp

    kernel, width, block = _dense_kernel(old, new, zeros, rolloff)
    taps = len(kernel)
    blocks = -(-(wave.shape[-1] + 1) // block)  # a block of input gives kernel.shape[1] outputs
    neighbours = -(-taps // block)
    right = (blocks + neighbours) * block - width - wave.shape[-1]
    padded = jnp.pad(wave, [(0, 0)] * (wave.ndim - 1) + [(width, right)]).reshape(*wave.shape[:-1], -1, block)
    windows = jnp.concatenate([padded[..., k : k + blocks, :] for k in range(neighbours)], -1)[..., :taps]
    out = jnp.matmul(windows, kernel, precision=jax.lax.Precision.HIGHEST)
    return out.reshape(*wave.shape[:-1], -1)[..., :length]


@lru_cache(maxsize=16)
def _dense_kernel(old: int, new: int, zeros: int, rolloff: float) -> tuple[np.ndarray, int, int]:
    """(kernel float32 [taps, outputs], left padding, input samples in a block).

    Some hundred samples make a block, so that the windows of the blocks overlap little.
    """
    width = math.ceil(zeros * old / (rolloff * min(old, new)))
    steps = max(1, -(-4 * width // old))
    taps = 2 * width + steps * old
    if taps * steps * new > MAX_DENSE:
        raise MossError(f"cannot resample a jax wave by {new}/{old}: the ratio is too unusual, expected a numpy wave")
    kernel, center = _kernel(old, new, zeros, rolloff)
    # The distance of tap k, at (k - width) / old, from output j, at j / new, in samples of the upsampled wave.
    distance = np.abs((np.arange(taps)[:, None] - width) * new - np.arange(steps * new) * old)
    return np.where(distance <= center, kernel[center + np.minimum(distance, center)], 0), width, steps * old

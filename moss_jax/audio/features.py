"""Features of waves: 16 kHz log-mel, 24 kHz mel, Kaldi filter banks. All of it is jnp and runs under jit.

Spectra are products with windowed DFT matrices: exact in float32 on every backend, and faster than an FFT of these
short lengths on a TPU. Layout is `[batch, time, bins]`. The formulas are those of sections 2 and 4 of the codec
specification; the sizes of each front end are one frozen dataclass.
"""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.errors import MossError


@dataclass(frozen=True)
class MelConfig:
    """Sizes of a mel spectrogram with slaney filters; the window is a periodic Hann of `n_fft` samples."""

    sample_rate: int  # Hz
    n_fft: int  # samples a frame
    hop_length: int  # samples from frame to frame
    num_mel_bins: int
    fmin: float  # Hz
    fmax: float  # Hz


LOG_MEL_16K = MelConfig(sample_rate=16000, n_fft=400, hop_length=160, num_mel_bins=128, fmin=0.0, fmax=8000.0)
MEL_24K = MelConfig(sample_rate=24000, n_fft=1920, hop_length=480, num_mel_bins=80, fmin=0.0, fmax=8000.0)


@dataclass(frozen=True)
class FbankConfig:
    """Sizes of Kaldi's filter bank features (povey window, snip_edges, no dither, power, log)."""

    sample_rate: int = 16000  # Hz
    frame_length: int = 400  # samples
    frame_shift: int = 160  # samples
    num_mel_bins: int = 80
    low_freq: float = 20.0  # Hz
    high_freq: float = 8000.0  # Hz
    preemphasis: float = 0.97


FBANK_16K = FbankConfig()


def log_mel_16k(wave: jax.Array, length: jax.Array | None = None, config: MelConfig = LOG_MEL_16K) -> jax.Array:
    """The speech tokenizer's input: log10 mel power, limited to 8 below its maximum, `(x + 4) / 4`.

    Args:
        wave: float32 [B, L], L a multiple of the hop, zero-padded on the right.
        length: int [B], the length of each wave with the zero padding that it has when it is alone: there it is
            reflected, and what comes later is ignored. None: L for all, which is what the reference does in a batch.

    Returns:
        float32 [B, L / hop, M]. Frames from `length / hop` on are meaningless.
    """
    frames = log10_mel(_reflected(wave, length, config.n_fft // 2)[:, : wave.shape[1] + config.n_fft - 1], config)
    if length is None:
        peak = frames.max((1, 2), keepdims=True)
    else:
        valid = jnp.arange(frames.shape[1])[None] < (length // config.hop_length)[:, None]
        peak = jnp.where(valid[..., None], frames, -jnp.inf).max((1, 2), keepdims=True)
    return limit(frames, peak)


def log10_mel(padded: jax.Array, config: MelConfig = LOG_MEL_16K) -> jax.Array:
    """log10 of the mel power, at least -10: [B, n_fft + (T - 1) * hop + (less than hop)] samples -> [B, T, M]."""
    real, imaginary = _spectrum(padded, config.n_fft, config.hop_length)
    power = jnp.square(real) + jnp.square(imaginary)
    return jnp.log10(jnp.maximum(_product(power, mel_filters(config)), 1e-10))


def limit(frames: jax.Array, peak: jax.Array) -> jax.Array:
    """The last step of `log_mel_16k`: clips to at most 8 (80 dB) below `peak`, which broadcasts."""
    return (jnp.maximum(frames, peak - 8.0) + 4.0) / 4.0


def mel_24k(wave: jax.Array, length: jax.Array | None = None, config: MelConfig = MEL_24K) -> jax.Array:
    """The speech decoder's mel: natural logarithm of the mel magnitude.

    Args:
        wave: float32 [B, L], L at least 721.
        length: int [B], how many samples of each wave are valid (None: all); it is reflected there.

    Returns:
        float32 [B, L // hop, M]. Frames from `length // hop` on are meaningless.
    """
    padding = (config.n_fft - config.hop_length) // 2
    if wave.shape[1] <= padding:
        raise MossError(f"a wave of {wave.shape[1]} samples is too short for a mel, expected more than {padding}")
    padded = _reflected(wave, length, padding)
    real, imaginary = _spectrum(padded, config.n_fft, config.hop_length)
    magnitude = jnp.sqrt(jnp.square(real) + jnp.square(imaginary) + 1e-9)
    return jnp.log(jnp.maximum(_product(magnitude, mel_filters(config)), 1e-5))


def kaldi_fbank(wave: jax.Array, config: FbankConfig = FBANK_16K) -> jax.Array:
    """Kaldi's log filter bank energies of waves in [-1, 1] (not scaled to 16 bits): [B, L] -> [B, T, M].

    T = 1 + (L - frame_length) // frame_shift. The mean over time is not subtracted: `mean_normalized` does that.
    """
    if wave.shape[1] < config.frame_length:
        raise MossError(
            f"a wave of {wave.shape[1]} samples is too short for filter banks, expected at least {config.frame_length}"
        )
    frames = framed(wave, config.frame_length, config.frame_shift)
    frames = frames - frames.mean(-1, keepdims=True)
    before = jnp.concatenate([frames[..., :1], frames[..., :-1]], -1)
    frames = frames - config.preemphasis * before
    window = _povey(config.frame_length).astype(np.float32)
    # An FFT, whose rounding is finer than that of a product with a DFT matrix: the logarithm shows it in weak bins.
    spectrum = jnp.fft.rfft(frames * window[None, None], _power_of_two(config.frame_length))
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.log(jnp.maximum(_product(power, _kaldi_filters(config)), np.finfo(np.float32).eps))


def mean_normalized(features: jax.Array, frames: jax.Array | None = None) -> jax.Array:
    """Features [B, T, M] without their mean over time; only the first `frames` [B] of each count when given."""
    if frames is None:
        return features - features.mean(1, keepdims=True)
    valid = (jnp.arange(features.shape[1])[None] < frames[:, None])[..., None]
    mean = jnp.where(valid, features, 0.0).sum(1, keepdims=True) / frames[:, None, None]
    return features - mean


@lru_cache(maxsize=8)
def mel_filters(config: MelConfig) -> np.ndarray:
    """Triangular filters on slaney's mel scale with slaney's area normalisation: float32 [n_fft // 2 + 1, M]."""
    edges = _mel_to_hz(np.linspace(_hz_to_mel(config.fmin), _hz_to_mel(config.fmax), config.num_mel_bins + 2))
    hz = np.linspace(0, config.sample_rate / 2, config.n_fft // 2 + 1)[:, None]
    rising = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))
    return filters.astype(np.float32)


# Slaney's scale: linear up to 1 kHz (15 mel), then logarithmic, 27 mel for a factor of 6.4.
def _hz_to_mel(hz: float) -> float:
    return hz * 0.015 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel / 0.015, 1000 * np.exp((np.maximum(mel, 15) - 15) * np.log(6.4) / 27))


@lru_cache(maxsize=8)
def _kaldi_filters(config: FbankConfig) -> np.ndarray:
    """Triangles that are linear in mel, without the Nyquist bin: float32 [n_fft // 2 + 1, M]."""
    n_fft = _power_of_two(config.frame_length)
    mel = 1127 * np.log(1 + np.arange(n_fft // 2 + 1) * config.sample_rate / n_fft / 700)[:, None]
    low, high = 1127 * np.log(1 + np.array([config.low_freq, config.high_freq]) / 700)
    edges = np.linspace(low, high, config.num_mel_bins + 2)
    rising = (mel - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    filters[-1] = 0
    return filters.astype(np.float32)


def _power_of_two(samples: int) -> int:
    return 1 << (samples - 1).bit_length()


@lru_cache(maxsize=8)
def _povey(length: int) -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))) ** 0.85


@lru_cache(maxsize=8)
def _hann(length: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)


@lru_cache(maxsize=8)
def _dft(n_fft: int) -> tuple[np.ndarray, np.ndarray]:
    """The cosines and sines of a DFT under a Hann window: two [n_fft, n_fft // 2 + 1]."""
    turns = np.outer(np.arange(n_fft), np.arange(n_fft // 2 + 1)) % n_fft  # exact, so that cos and sin are too
    angle = 2 * np.pi * turns / n_fft
    weights = _hann(n_fft)[:, None]
    return (weights * np.cos(angle)).astype(np.float32), (weights * np.sin(angle)).astype(np.float32)


def _spectrum(padded: jax.Array, n_fft: int, hop: int) -> tuple[jax.Array, jax.Array]:
    frames = framed(padded, n_fft, hop)
    cosine, sine = _dft(n_fft)
    return _product(frames, cosine), _product(frames, sine)


def _product(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


def framed(wave: jax.Array, length: int, hop: int) -> jax.Array:
    """Overlapping frames [B, L] -> [B, 1 + (L - length) // hop, length], put together from slices, without a gather."""
    count = 1 + (wave.shape[1] - length) // hop
    parts = -(-length // hop)
    needed = (count + parts - 1) * hop
    wave = jnp.pad(wave, ((0, 0), (0, max(0, needed - wave.shape[1]))))[:, :needed]
    blocks = wave.reshape(wave.shape[0], count + parts - 1, hop)
    return jnp.concatenate([blocks[:, k : k + count] for k in range(parts)], -1)[..., :length]


def _reflected(wave: jax.Array, length: jax.Array | None, padding: int) -> jax.Array:
    """`padding` reflected samples on both sides: [B, L] -> [B, padding + L + padding]; the right side at `length`."""
    if length is None:
        return jnp.pad(wave, ((0, 0), (padding, padding)), mode="reflect")
    index = jnp.abs(jnp.arange(-padding, wave.shape[1] + padding))[None]
    last = length[:, None] - 1
    index = jnp.where(index > last, 2 * last - index, index)
    return jnp.take_along_axis(wave, jnp.clip(index, 0, wave.shape[1] - 1), axis=1)

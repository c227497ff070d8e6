"""Distances between waves that do not mind phases: multi-resolution STFT and mel.

Sources: Parallel WaveGAN (https://arxiv.org/abs/1910.11480) for the STFT loss, `mel_loss` of the released code.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.audio.features import MelConfig, framed, mel_filters
from moss_jax.speech_decoder.vocoder.stft import hann

FLOOR = 1e-7  # of power: below -70 dB of a full-scale bin nothing counts, and no square root has a steep gradient
MEL_FLOOR = 1e-5  # as in the features


def stft(wave: jax.Array, fft: int, hop: int, window: int, centred: bool = True) -> jax.Array:
    """wave float32 [B, L] -> complex [B, T, fft / 2 + 1] under a periodic Hann window, as torch.stft; where the window
    is shorter than the fft, but for a linear phase.

    Args:
        centred: frames stand around samples 0, hop, ... of the reflected wave; otherwise they begin there.
    """
    if centred:
        wave = jnp.pad(wave, ((0, 0), (fft // 2, fft // 2)), mode="reflect")
    before = (fft - window) // 2  # the window stands in the middle; a shift within the frame turns phases only
    wave = wave[:, before : wave.shape[1] - (fft - window - before)]
    return jnp.fft.rfft(framed(wave, window, hop) * hann(window).astype(np.float32), fft, axis=-1)


def magnitude(wave: jax.Array, fft: int, hop: int, window: int) -> jax.Array:
    """float32 [B, L] -> [B, T, fft / 2 + 1], at least the root of FLOOR."""
    spectrum = stft(wave, fft, hop, window)
    return jnp.sqrt(jnp.maximum(jnp.square(spectrum.real) + jnp.square(spectrum.imag), FLOOR))


def stft_loss(real: jax.Array, made: jax.Array, resolutions: tuple[tuple[int, int, int], ...]) -> jax.Array:
    """The mean over resolutions (fft, hop, window) of spectral convergence + L1 of the logarithms; waves [B, L].

    The convergence is that of the whole batch: a silent item, alone, would divide by nearly nothing.
    """
    total = jnp.float32(0)
    for resolution in resolutions:
        x = magnitude(real, *resolution)
        y = magnitude(made, *resolution)
        convergence = jnp.sqrt((jnp.square(x - y).sum() + FLOOR) / jnp.square(x).sum())
        total += convergence + jnp.abs(jnp.log(x) - jnp.log(y)).mean()
    return total / len(resolutions)


def log_mel(wave: jax.Array, config: MelConfig) -> jax.Array:
    """`mel_24k` through an FFT, whose gradient is cheap on a CPU: float32 [B, L] -> [B, L // hop, M]."""
    padding = (config.n_fft - config.hop_length) // 2
    wave = jnp.pad(wave, ((0, 0), (padding, padding)), mode="reflect")
    spectrum = stft(wave, config.n_fft, config.hop_length, config.n_fft, centred=False)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.log(jnp.maximum(jnp.sqrt(power + 1e-9) @ mel_filters(config), MEL_FLOOR))


def mel_loss(real: jax.Array, made: jax.Array, configs: tuple[MelConfig, ...]) -> jax.Array:
    """The sum over mel spectrograms of the mean absolute difference; waves [B, L]."""
    return sum(jnp.abs(log_mel(real, config) - log_mel(made, config)).mean() for config in configs)

"""Distances between waves that ignore phases: multi-resolution STFT and mel.

Sources: Parallel WaveGAN (https://arxiv.org/abs/1910.11480) for the STFT loss, `mel_loss` of the released code.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.audio.features import MelConfig, framed, mel_filters
from moss_jax.speech_decoder.vocoder.stft import hann

# Of power, -70 dB of a full-scale bin: smaller values are ignored, and no square root has a steep gradient.
FLOOR = 1e-7
MEL_FLOOR = 1e-5  # as in the features


def stft(wave: jax.Array, fft: int, hop: int, window: int, centred: bool = True) -> jax.Array:
    """wave float32 [B, L] -> complex [B, T, fft / 2 + 1] under a periodic Hann window.

    The same as torch.stft, except for a linear phase where the window is shorter than the fft.

    Args:
        centred: frames are centred at samples 0, hop, ... of the wave, which is padded by reflection; otherwise they
            begin there.
    """
    if centred:
        wave = jnp.pad(wave, ((0, 0), (fft // 2, fft // 2)), mode="reflect")
    before = (fft - window) // 2  # the window is in the middle of the fft; a shift within the frame changes phases only
    wave = wave[:, before : wave.shape[1] - (fft - window - before)]
    return jnp.fft.rfft(framed(wave, window, hop) * hann(window).astype(np.float32)[None, None], fft, axis=-1)


def magnitude(wave: jax.Array, fft: int, hop: int, window: int) -> jax.Array:
    """float32 [B, L] -> [B, T, fft / 2 + 1], at least the root of FLOOR."""
    spectrum = stft(wave, fft, hop, window)
    return jnp.sqrt(jnp.maximum(jnp.square(spectrum.real) + jnp.square(spectrum.imag), FLOOR))


def stft_loss(real: jax.Array, generated: jax.Array, resolutions: tuple[tuple[int, int, int], ...]) -> jax.Array:
    """Spectral convergence + L1 of the log magnitudes, averaged over resolutions (fft, hop, window); waves [B, L].

    The convergence is that of the whole batch: for a silent item alone the denominator would be nearly zero.
    """
    total = jnp.float32(0)
    for resolution in resolutions:
        x = magnitude(real, *resolution)
        y = magnitude(generated, *resolution)
        convergence = jnp.sqrt((jnp.square(x - y).sum() + FLOOR) / jnp.square(x).sum())
        total += convergence + jnp.abs(jnp.log(x) - jnp.log(y)).mean()
    return total / len(resolutions)


def log_mel(wave: jax.Array, config: MelConfig) -> jax.Array:
    """`mel_24k` computed with an FFT, whose gradient is cheap on a CPU: float32 [B, L] -> [B, L // hop, M]."""
    padding = (config.n_fft - config.hop_length) // 2
    wave = jnp.pad(wave, ((0, 0), (padding, padding)), mode="reflect")
    spectrum = stft(wave, config.n_fft, config.hop_length, config.n_fft, centred=False)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.log(jnp.maximum(jnp.sqrt(power + 1e-9) @ mel_filters(config), MEL_FLOOR))


def mel_loss(real: jax.Array, generated: jax.Array, configs: tuple[MelConfig, ...]) -> jax.Array:
    """The sum over mel spectrograms of the mean absolute difference; waves [B, L]."""
    total = jnp.float32(0)
    for config in configs:
        total += jnp.abs(log_mel(real, config) - log_mel(generated, config)).mean()
    return total

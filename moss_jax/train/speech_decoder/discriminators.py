"""What tells real speech from the vocoder's: a discriminator for each of several periods and STFT resolutions.

Sources: HiFi-GAN's multi-period discriminator (https://arxiv.org/abs/2010.05646), the multi-band, multi-resolution one
of descript-audio-codec; losses of HiFi-GAN (least squares, feature matching) and the truncated pointwise relativistic
one of `cosyvoice/utils/losses.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_jax.errors import MossError
from moss_jax.nn.layers import named
from moss_jax.train.speech_decoder.spectral import stft

SLOPE = 0.1  # of the leaky rectifiers
BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # of the spectrum, each with its convolutions


@dataclass(frozen=True)
class DiscriminatorConfig:
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)  # samples
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)  # of the convolutions of one period
    ffts: tuple[int, ...] = (2048, 1024, 512)  # samples; hop is a quarter
    fft_channels: int = 32

    def __post_init__(self):
        if not (self.periods or self.ffts) or (self.periods and not self.period_channels):
            raise MossError("discriminators: none, expected some periods with their channels, or ffts")

    @property
    def shortest(self) -> int:
        """Samples of a wave that all of them take."""
        return max((*self.ffts, *self.periods))


class NormConv2d(nn.Module):
    """A weight-normalised convolution over two axes: [B, X, Y, I] -> [B, X', Y', O], zero-padded by half the width."""

    features: int
    width: tuple[int, int]
    stride: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.width, x.shape[-1], self.features)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", (0, 1, 2), 3)
        v = self.param("v", named(init, None, None, "conv_in", "conv_out"), shape, jnp.float32)
        norm = named(lambda *_: jnp.sqrt(jnp.square(nn.unbox(v)).sum((0, 1, 2))), "conv_out")
        g = self.param("g", norm, (self.features,), jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, "conv_out"), (self.features,), jnp.float32)
        kernel = v * g / jnp.sqrt(jnp.square(v).sum((0, 1, 2)))
        pads = [(width // 2, width // 2) for width in self.width]
        return (
            jax.lax.conv_general_dilated(x, kernel, self.stride, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            + bias
        )


class PeriodDiscriminator(nn.Module):
    """Judges every `period`-th sample: wave [B, L] -> (score [B, ...], its features)."""

    period: int
    channels: Sequence[int]

    @nn.compact
    def __call__(self, wave: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        rest = -wave.shape[1] % self.period
        wave = jnp.pad(wave, ((0, 0), (0, rest)), mode="reflect")
        x = wave.reshape(wave.shape[0], -1, self.period, 1)
        features = []
        for i, channels in enumerate(self.channels):
            stride = 3 if i + 1 < len(self.channels) else 1
            x = nn.leaky_relu(NormConv2d(channels, (5, 1), (stride, 1), name=f"conv_{i}")(x), SLOPE)
            features.append(x)
        x = NormConv2d(1, (3, 1), name="out")(x)
        return x, [*features, x]


class SpectrumDiscriminator(nn.Module):
    """Judges a complex spectrogram band by band: wave [B, L] -> (score [B, ...], its features)."""

    fft: int
    channels: int

    @nn.compact
    def __call__(self, wave: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        wave = wave - wave.mean(1, keepdims=True)
        # The sample itself and not `max`: its gradient compares every sample with the maximum, and where the compiler
        # has rounded the two differently none is equal, which gives 0 / 0.
        peak = jnp.abs(jnp.take_along_axis(wave, jnp.abs(wave).argmax(1)[:, None], 1))
        wave = 0.8 * wave / (peak + 1e-9)
        spectrum = stft(wave, self.fft, self.fft // 4, self.fft)
        parts = jnp.stack([spectrum.real, spectrum.imag], -1)  # [B, T, bins, 2]
        bins = parts.shape[2]
        features = []
        bands = []
        for place, (low, high) in enumerate(BANDS):
            x = parts[:, :, int(low * bins) : int(high * bins)]
            for i in range(5):
                width, stride = ((3, 9), (1, 2 if i else 1)) if i < 4 else ((3, 3), (1, 1))
                x = nn.leaky_relu(NormConv2d(self.channels, width, stride, name=f"band_{place}_conv_{i}")(x), SLOPE)
                if i:
                    features.append(x)
            bands.append(x)
        x = NormConv2d(1, (3, 3), name="out")(jnp.concatenate(bands, 2))
        return x, [*features, x]


class Discriminators(nn.Module):
    """All of them: wave float32 [B, L] -> [(score, features), ...]."""

    config: DiscriminatorConfig

    @nn.compact
    def __call__(self, wave: jax.Array) -> list[tuple[jax.Array, list[jax.Array]]]:
        c = self.config
        judges = [PeriodDiscriminator(period, c.period_channels, name=f"period_{period}") for period in c.periods]
        judges += [SpectrumDiscriminator(fft, c.fft_channels, name=f"fft_{fft}") for fft in c.ffts]
        return [judge(wave) for judge in judges]


def generator_loss(made) -> jax.Array:
    """Least squares: what was made should score 1."""
    return sum(jnp.square(1 - score).mean() for score, _ in made)


def discriminator_loss(real, made) -> jax.Array:
    """Least squares: what is real should score 1, what was made 0."""
    return sum(jnp.square(1 - a).mean() + jnp.square(b).mean() for (a, _), (b, _) in zip(real, made, strict=True))


def feature_loss(real, made) -> jax.Array:
    """Twice the sum of the mean absolute differences of all features."""
    pairs = [
        (jax.lax.stop_gradient(x), y)
        for (_, a), (_, b) in zip(real, made, strict=True)
        for x, y in zip(a, b, strict=True)
    ]
    return 2 * sum(jnp.abs(x - y).mean() for x, y in pairs)


def relativistic_loss(better, worse, tau: float) -> jax.Array:
    """What should score better does, by the same margin everywhere: the squared excess below the median margin, at
    most `tau`, summed over discriminators."""
    total = jnp.float32(0)
    for (a, _), (b, _) in zip(better, worse, strict=True):
        difference = a - b
        excess = difference - jnp.median(difference)
        below = excess < 0
        loss = jnp.where(below, jnp.square(excess), 0).sum() / jnp.maximum(below.sum(), 1)
        total += tau - jax.nn.relu(tau - loss)
    return total

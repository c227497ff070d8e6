"""Discriminators of real and generated speech, one for each of several periods and STFT resolutions.

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
from moss_jax.nn.layers import named, over_last_axes
from moss_jax.train.speech_decoder.spectral import stft

Scores = list[tuple[jax.Array, list[jax.Array]]]  # of each discriminator: score [B, ...], features
SLOPE = 0.1  # of the leaky rectifiers
BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # of the spectrum, each with its convolutions


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminators."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)  # samples
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)  # of the convolutions of one period's discriminator
    ffts: tuple[int, ...] = (2048, 1024, 512)  # samples; the hop is a quarter of it
    fft_channels: int = 32

    def __post_init__(self) -> None:
        if not (self.periods or self.ffts) or (self.periods and not self.period_channels):
            raise MossError("discriminators: none, expected some periods with their channels, or ffts")

    @property
    def shortest(self) -> int:
        """The shortest wave that all discriminators accept, in samples."""
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
        kernel = v * over_last_axes(g, v) / jnp.sqrt(jnp.square(v).sum((0, 1, 2), keepdims=True))
        pads = [(width // 2, width // 2) for width in self.width]
        y = jax.lax.conv_general_dilated(x, kernel, self.stride, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + over_last_axes(bias, y)


class PeriodDiscriminator(nn.Module):
    """Scores the wave folded by `period`: wave [B, L] -> (score [B, ...], features)."""

    period: int
    channels: Sequence[int]

    @nn.compact
    def __call__(self, wave: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        padding = -wave.shape[1] % self.period
        wave = jnp.pad(wave, ((0, 0), (0, padding)), mode="reflect")
        x = wave.reshape(wave.shape[0], -1, self.period, 1)
        features = []
        for i, channels in enumerate(self.channels):
            stride = 3 if i + 1 < len(self.channels) else 1
            x = nn.leaky_relu(NormConv2d(channels, (5, 1), (stride, 1), name=f"conv_{i}")(x), SLOPE)
            features.append(x)
        x = NormConv2d(1, (3, 1), name="out")(x)
        return x, [*features, x]


class SpectrumDiscriminator(nn.Module):
    """Scores a complex spectrogram by bands: wave [B, L] -> (score [B, ...], features)."""

    fft: int
    channels: int

    @nn.compact
    def __call__(self, wave: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        wave = wave - wave.mean(1, keepdims=True)
        # Takes the sample instead of the maximum: the gradient of `max` compares every sample with the maximum, and
        # where the compiler rounds the two differently, no sample is equal to it, which gives 0 / 0.
        peak = jnp.abs(jnp.take_along_axis(wave, jnp.abs(wave).argmax(1)[:, None], 1))
        wave = 0.8 * wave / (peak + 1e-9)
        spectrum = stft(wave, self.fft, self.fft // 4, self.fft)
        parts = jnp.stack([spectrum.real, spectrum.imag], -1)  # [B, T, bins, 2]
        bins = parts.shape[2]
        features = []
        bands = []
        for band, (low, high) in enumerate(BANDS):
            x = parts[:, :, int(low * bins) : int(high * bins)]
            for i in range(5):
                width = (3, 9) if i < 4 else (3, 3)
                stride = (1, 2) if 0 < i < 4 else (1, 1)
                x = nn.leaky_relu(NormConv2d(self.channels, width, stride, name=f"band_{band}_conv_{i}")(x), SLOPE)
                if i:
                    features.append(x)
            bands.append(x)
        x = NormConv2d(1, (3, 3), name="out")(jnp.concatenate(bands, 2))
        return x, [*features, x]


class Discriminators(nn.Module):
    """All discriminators: wave float32 [B, L] -> [(score, features), ...]."""

    config: DiscriminatorConfig

    @nn.compact
    def __call__(self, wave: jax.Array) -> Scores:
        config = self.config
        scores = []
        for period in config.periods:
            scores.append(PeriodDiscriminator(period, config.period_channels, name=f"period_{period}")(wave))
        for fft in config.ffts:
            scores.append(SpectrumDiscriminator(fft, config.fft_channels, name=f"fft_{fft}")(wave))
        return scores


def generator_loss(generated: Scores) -> jax.Array:
    """Least squares towards a score of 1 for generated speech."""
    total = jnp.float32(0)
    for score, _ in generated:
        total += jnp.square(1 - score).mean()
    return total


def discriminator_loss(real: Scores, generated: Scores) -> jax.Array:
    """Least squares towards a score of 1 for real and of 0 for generated speech."""
    total = jnp.float32(0)
    for (real_score, _), (generated_score, _) in zip(real, generated, strict=True):
        total += jnp.square(1 - real_score).mean() + jnp.square(generated_score).mean()
    return total


def feature_loss(real: Scores, generated: Scores) -> jax.Array:
    """Twice the sum of the mean absolute differences of all features."""
    total = jnp.float32(0)
    for (_, real_features), (_, generated_features) in zip(real, generated, strict=True):
        for x, y in zip(real_features, generated_features, strict=True):
            total += jnp.abs(jax.lax.stop_gradient(x) - y).mean()
    return 2 * total


def relativistic_loss(better: Scores, worse: Scores, tau: float) -> jax.Array:
    """The truncated pointwise relativistic loss: the scores of `better` should exceed those of `worse`.

    For each discriminator it is the mean of the squared shortfall below the median margin, truncated at `tau`; the
    result is the sum over discriminators.
    """
    total = jnp.float32(0)
    for (a, _), (b, _) in zip(better, worse, strict=True):
        difference = a - b
        excess = difference - jnp.median(difference)
        below = excess < 0
        loss = jnp.where(below, jnp.square(excess), 0).sum() / jnp.maximum(below.sum(), 1)
        total += tau - jax.nn.relu(tau - loss)
    return total

"""HiFT vocoder: log-mel -> waveform, a harmonic source filtered by a convolutional generator that predicts an STFT.

Source: HiFTNet (https://arxiv.org/abs/2309.09493) as in CosyVoice 2, `cosyvoice/hifigan/{generator,f0_predictor}.py`.

Every function takes items that are shorter than the array: `lengths` are the mel frames of each. The valid part of the
result is that of the item alone: layers see zeros after its end, as they see zero padding without it.

Dimension letters: B batch, T mel frames or steps of a stage, M mel bins, C channels, W kernel width.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from moss_jax.nn.conv import Conv1d, conv1d
from moss_jax.nn.layers import Linear, named, over_last_axes
from moss_jax.nn.tree import param_shapes
from moss_jax.speech_decoder.vocoder.config import VocoderConfig
from moss_jax.speech_decoder.vocoder.stft import istft, stft

Array = TypeVar("Array", np.ndarray, jax.Array)


def weight_norm(v: Array, g: Array, axis: int) -> Array:
    """The kernel g * v / |v|.

    Args:
        v: [..., W, in, out].
        g: [..., out] or [..., in].
        axis: of v that g belongs to: -1 (outputs) or -2 (inputs). The norm is taken over the other two.
    """
    others = tuple(a for a in (-3, -2, -1) if a != axis)
    norm = (v * v).sum(others, keepdims=True) ** 0.5
    gain = g[..., None, None, :] if axis == -1 else g[..., None, :, None]
    kernel: Array = v * gain / norm
    return kernel


def fold_weight_norm(params: Mapping[str, Any]) -> dict[str, Any]:
    """Flat parameters with every pair `.../g`, `.../v` replaced by `.../kernel`, for a model with weight_norm=False."""
    folded = {path: value for path, value in params.items() if path.rpartition("/")[2] not in ("g", "v")}
    for path in params:
        layer, _, leaf = path.rpartition("/")
        if leaf == "v":
            axis = -2 if layer.startswith("ups_") else -1
            folded[f"{layer}/kernel"] = weight_norm(params[path], params[f"{layer}/g"], axis)
    return folded


class NormConv(nn.Module):
    """The kernel [(L,) W, in, out] and bias [(L,) out] of a convolution, or of `layers` stacked ones.

    With `weight_norm` the parameters are v and g. The norm is taken for each output channel, of a transposed
    convolution for each input channel.
    """

    features: int
    width: int
    weight_norm: bool
    layers: int | None = None
    transposed: bool = False

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        stack: tuple[int, ...] = ()
        names: tuple[str, ...] = ()
        if self.layers is not None:
            stack = (self.layers,)
            names = ("layers",)
        shape = (*stack, self.width, channels, self.features)
        axes = (*names, None, "conv_in", "conv_out")
        bias = self.param(
            "bias", named(nn.initializers.zeros, *names, "conv_out"), (*stack, self.features), jnp.float32
        )
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", (-3, -2), -1)
        if not self.weight_norm:
            return self.param("kernel", named(init, *axes), shape, jnp.float32), bias
        axis = -2 if self.transposed else -1
        v = self.param("v", named(init, *axes), shape, jnp.float32)
        others = tuple(a for a in (-3, -2, -1) if a != axis)
        norms = named(lambda *_: jnp.sqrt(jnp.square(nn.unbox(v)).sum(others)), *names, axes[axis])
        g = self.param("g", norms, (*stack, shape[axis]), jnp.float32)
        return weight_norm(v, g, axis), bias


def _same(x: jax.Array, kernel: jax.Array, bias: jax.Array, dilation: int = 1) -> jax.Array:
    """A convolution with zero padding that keeps the length."""
    reach = dilation * (kernel.shape[0] - 1) // 2
    return conv1d(x, kernel, bias, dilation=dilation, padding=(reach, reach))


def _masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return x if mask is None else x * mask


def conv_transpose1d(x: jax.Array, kernel: jax.Array, bias: jax.Array, rate: int) -> jax.Array:
    """Transposed convolution as in torch with padding (W - rate) / 2.

    x [B, T, in], kernel [W, in, out], bias [out] -> [B, rate * T, out].

    Output sample rate * m + r is a sum over q of x[m - q] @ kernel[rate * q + r + padding]: one ordinary convolution
    computes all `rate` phases r at once.
    """
    width = kernel.shape[0]
    padding = (width - rate) // 2
    first_q = -((rate - 1 + padding) // rate)
    last_q = (width - 1 - padding) // rate
    before = -(rate * first_q + padding)
    after = rate * (last_q + 1) + padding - width
    kernel = rearrange(jnp.pad(kernel, ((before, after), (0, 0), (0, 0))), "(q r) I O -> q I (r O)", r=rate)
    y = conv1d(x, kernel[::-1], padding=(last_q, -first_q))
    y = rearrange(y, "B T (r O) -> B (T r) O", r=rate)
    return y + over_last_axes(bias, y)


# sin(pi r) = r (c0 + c1 r^2 + ...) for |r| <= 1/2, with an error of at most 4e-9.
SINE = (3.1415925, -5.1677070, 2.5500314, -0.59804517, 0.07722012)


class ResBlock(nn.Module):
    """Residual pairs of convolutions with snake activations: x [B, T, C] -> [B, T, C].

    Zeros after the end of an item stay zeros.
    """

    width: int
    dilations: tuple[int, ...]
    weight_norm: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        channels = x.shape[-1]
        layers = len(self.dilations)
        conv1 = NormConv(channels, self.width, self.weight_norm, layers, name="conv1")(channels)
        conv2 = NormConv(channels, self.width, self.weight_norm, layers, name="conv2")(channels)
        ones = named(nn.initializers.ones, "layers", "conv_out")
        alpha1 = self.param("alpha1", ones, (layers, channels), jnp.float32)
        alpha2 = self.param("alpha2", ones, (layers, channels), jnp.float32)
        for i, dilation in enumerate(self.dilations):
            y = _same(snake(x, alpha1[i]), conv1[0][i], conv1[1][i], dilation)
            y = _same(snake(_masked(y, mask), alpha2[i]), conv2[0][i], conv2[1][i])
            x = x + _masked(y, mask)
        return x


def snake(x: jax.Array, alpha: jax.Array) -> jax.Array:
    """x + sin(alpha x)^2 / alpha, alpha [C].

    The square has period pi. On a CPU a polynomial on half a turn is 25 times as fast as XLA's sine, which would take
    as long as the convolutions.
    """
    half_turns = x * over_last_axes(alpha / jnp.pi, x)
    r = half_turns - jnp.round(half_turns)
    u = r * r
    sine = jnp.full_like(u, SINE[-1])
    for coefficient in SINE[-2::-1]:
        sine = sine * u + coefficient
    return x + jnp.square(r * sine) / over_last_axes(alpha + 1e-9, x)  # 1e-9 as in the reference


class HiFT(nn.Module):
    """The vocoder. `__call__` runs its three steps, `f0`, `source` and `decode`, and initialises all parameters."""

    config: VocoderConfig

    def setup(self) -> None:
        c = self.config
        norm = c.weight_norm
        self.f0_conv = [NormConv(c.f0_channels, 3, norm) for _ in range(c.f0_layers)]
        self.f0_classifier = Linear(1, ("conv_in", None))
        self.merge = Linear(1, (None, None))
        self.conv_pre = NormConv(c.channels, 7, norm)
        self.conv_post = NormConv(c.fft_size + 2, 7, norm)
        ups = []
        downs = []
        source_resblocks = []
        resblocks = []
        for i, width in enumerate(c.upsample_widths):
            channels = c.channels >> (i + 1)
            down = prod(c.upsample_rates[i + 1 :])
            ups.append(NormConv(channels, width, norm, transposed=True))
            padding = (down // 2, down // 2) if down > 1 else (0, 0)
            downs.append(Conv1d(channels, 2 * down if down > 1 else 1, stride=down, padding=padding))
            source_resblocks.append(ResBlock(c.source_resblock_widths[i], c.source_resblock_dilations[i], norm))
            for width, dilations in zip(c.resblock_widths, c.resblock_dilations, strict=True):
                resblocks.append(ResBlock(width, dilations, norm))
        self.ups = ups
        self.source_downs = downs
        self.source_resblocks = source_resblocks
        self.resblocks = resblocks

    def __call__(
        self,
        mel: jax.Array,
        noise: jax.Array,
        lengths: jax.Array | None = None,
        source_start: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Log-mel -> wave.

        Args:
            mel: float32 [B, T, M], natural log.
            noise: float32 [B, hop * T, harmonics], standard normal.
            lengths: int32 [B], valid frames of each item; None: all.
            source_start: float32 [B, samples], replaces the first samples of the source.

        Returns:
            (wave float32 [B, hop * T] at `sample_rate`, undefined after `hop * lengths`; the source, of the same
            shape)
        """
        source, _ = self.source(self.f0(mel, lengths), noise, lengths)
        if source_start is not None:
            source = source.at[:, : source_start.shape[1]].set(source_start)
        return self.decode(mel, source, lengths), source

    def f0(self, mel: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Log-mel [B, T, M] -> fundamental frequency in Hz [B, T]."""
        mask = self._mask(lengths, 1, mel.shape[1])
        x = _masked(mel, mask)
        for conv in self.f0_conv:
            x = _masked(nn.elu(_same(x, *conv(x.shape[-1]))), mask)
        return jnp.abs(self.f0_classifier(x)[..., 0])

    def source(
        self,
        f0: jax.Array,
        noise: jax.Array,
        lengths: jax.Array | None = None,
        phase: jax.Array | None = None,
        started: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """F0 [B, T] in Hz and noise [B, hop * T, harmonics] -> the excitation and its phases.

        Phases are counted in 2^-32 turns and wrap around: adding them is exact, so that the result does not depend on
        how a stream was divided. Between the centres of two frames a phase grows linearly by `hop` steps of the later
        frame.

        Args:
            phase: uint32 [B, harmonics], at the centre of the frame before the first; None: zeros.
            started: bool [B], whether there is a frame before the first. If not, the phase is constant up to the centre
                of the first frame, as it is after that of the last one. None: False.

        Returns:
            (source float32 [B, hop * T], phases uint32 [B, T, harmonics] at the centres of the frames)
        """
        c = self.config
        steps = f0[..., None] * jnp.arange(1, c.harmonics + 1, dtype=f0.dtype)[None, None] / c.sample_rate
        steps = _masked(steps % 1 * c.hop, self._mask(lengths, 1, f0.shape[1]))
        steps = jax.lax.stop_gradient(steps)  # turns in a frame [B, T, harmonics]
        phases = jnp.cumsum(_to_fixed(steps), 1, dtype=jnp.uint32)
        if phase is not None:
            phases = phases + phase[:, None]
        if started is None:
            started = jnp.zeros(f0.shape[0], bool)
        steps = steps.at[:, 0].set(jnp.where(started[:, None], steps[:, 0], 0))
        before = phases - _to_fixed(steps)
        fraction = (jnp.arange(c.hop, dtype=f0.dtype) + 0.5)[:, None] / c.hop
        turns = _from_fixed(before)[:, :, None] + steps[:, :, None] * fraction[None, None]  # [B, T, hop, harmonics]
        batch, frames = f0.shape
        turns = rearrange(turns, "B T hop harmonics -> B (T hop) harmonics")
        last = jnp.broadcast_to(_from_fixed(phases[:, -1:]), (batch, c.hop - c.hop // 2, c.harmonics))
        turns = jnp.concatenate([turns[:, c.hop // 2 :], last], 1)[:, : frames * c.hop]
        sines = c.sine_amplitude * jnp.sin(2 * jnp.pi * (turns - jnp.round(turns)))
        voiced = jnp.repeat(f0 > c.voiced_threshold, c.hop, axis=1)[..., None]
        x = jnp.where(voiced, sines + c.noise_std * noise, c.sine_amplitude / 3 * noise)
        return jnp.tanh(self.merge(x)[..., 0]), phases

    def decode(self, mel: jax.Array, source: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Log-mel [B, T, M] and source [B, hop * T] -> wave [B, hop * T]."""
        c = self.config
        frames = mel.shape[1]
        stft_rate = c.hop // c.fft_hop  # STFT frames in a mel frame
        last_mask = self._mask(lengths, stft_rate, stft_rate * frames + 1, 1)
        excitation = stft(source, c.fft_size, c.fft_hop, None if lengths is None else lengths * c.hop)
        excitation = _masked(excitation, last_mask)  # [B, stft_rate * T + 1, fft_size + 2]
        mask = self._mask(lengths, 1, frames)
        x = _masked(_same(_masked(mel, mask), *self.conv_pre(c.mel_bins)), mask)
        rate = 1
        for i, up in enumerate(c.upsample_rates):
            rate *= up
            x = conv_transpose1d(nn.leaky_relu(x, c.leaky_slope), *self.ups[i](x.shape[-1]), up)
            mask = self._mask(lengths, rate, rate * frames)
            if i == len(c.upsample_rates) - 1:
                x = jnp.concatenate([x[:, 1:2], x], 1)  # reflected, one step more: the STFT has a frame at both ends
                mask = last_mask
            y = _masked(self.source_downs[i](excitation), mask)
            x = _masked(x, mask) + self.source_resblocks[i](y, mask)
            count = len(c.resblock_widths)
            outputs = [block(x, mask) for block in self.resblocks[i * count : (i + 1) * count]]
            x = sum(outputs[1:], outputs[0]) / count
        x = _same(nn.leaky_relu(x, 0.01), *self.conv_post(x.shape[-1]))  # torch's default slope, as in the reference
        magnitude, phase = jnp.split(x, 2, -1)
        wave = self.inverse(jnp.exp(magnitude), phase if c.free_phase else jnp.sin(phase), lengths)
        return jnp.clip(wave, -c.audio_limit, c.audio_limit)

    def inverse(self, magnitude: jax.Array, phase: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """The predicted STFT [B, frames + 1, bins], magnitude and phase in radians -> wave [B, frames * fft_hop]."""
        c = self.config
        magnitude = jnp.minimum(magnitude, c.magnitude_limit)
        spectrum = jnp.concatenate([magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)], -1)
        mask = self._mask(lengths, c.hop // c.fft_hop, magnitude.shape[1], 1)
        return istft(spectrum, c.fft_size, c.fft_hop, None if mask is None else mask[..., 0] > 0)

    def _mask(self, lengths: jax.Array | None, rate: int, size: int, extra: int = 0) -> jax.Array | None:
        """The valid steps of a stage with `rate` steps in a mel frame: float32 [B, size, 1] of 0 and 1, or None."""
        if lengths is None:
            return None
        return (jnp.arange(size)[None] < rate * lengths[:, None] + extra).astype(jnp.float32)[..., None]


def sine_noise(config: VocoderConfig, key: jax.Array, first: jax.Array | int, frames: int) -> jax.Array:
    """The noise of the mel frames first, first + 1, ...: float32 [frames * hop, harmonics].

    It depends on the key and the absolute frame alone, not on how a stream was divided.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(frames))
    noise = jax.vmap(lambda key: jax.random.normal(key, (config.hop, config.harmonics)))(keys)
    return rearrange(noise, "frames hop harmonics -> (frames hop) harmonics")


def _to_fixed(turns: jax.Array) -> jax.Array:
    """Turns -> their fraction in 2^-32 turns, uint32; exact, because a float32 fraction has at most 24 bits."""
    return ((turns - jnp.floor(turns)) * 2.0**32).astype(jnp.uint32)


def _from_fixed(phases: jax.Array) -> jax.Array:
    """uint32 in 2^-32 turns -> float32 in turns, rounded down to 2^-24."""
    return (phases >> 8).astype(jnp.float32) * 2.0**-24


@cache
def vocoder_shapes(config: VocoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat {path: ShapeDtypeStruct} of the parameters as they are stored: weight norm in two parts."""
    mel = jax.ShapeDtypeStruct((1, 4, config.mel_bins), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, 4 * config.hop, config.harmonics), jnp.float32)
    return param_shapes(HiFT(replace(config, weight_norm=True)), mel, noise)

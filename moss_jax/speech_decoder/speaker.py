"""CAM++: Kaldi filter banks of a voice -> its speaker embedding (codec specification, section 4.2; 3D-Speaker's
CAMPPlus).

Runs once for each voice. Lengths are padded to a few buckets and masked: the result is that of the unpadded clip, and
other lengths in the same bucket compile nothing. Batch normalisation is in evaluation mode: its statistics are plain
parameters.

Dimension letters: B batch, T frames, M mel bins or the rows that strides leave of them, C channels.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from moss_jax.audio.features import FBANK_16K, kaldi_fbank, mean_normalized
from moss_jax.checkpoint.config_io import check_sizes
from moss_jax.errors import MossError
from moss_jax.nn.conv import Conv1d
from moss_jax.nn.layers import Linear, named, over_last_axes
from moss_jax.nn.tree import param_shapes

EPSILON = 1e-5
MIN_FRAMES = 3  # two after the stride, without which there is no standard deviation


@dataclass(frozen=True)
class SpeakerConfig:
    """Sizes of CAM++. A dense layer has `bottleneck` channels inside and adds `growth_rate` channels."""

    num_mel_bins: int  # of the filter banks; a multiple of 8
    embedding_size: int
    head_channels: int  # of the two-dimensional convolutions
    head_blocks: tuple[int, int]  # residual blocks in the two groups of the head
    init_channels: int  # after the first one-dimensional convolution
    growth_rate: int
    bottleneck: int
    context_reduction: int  # the context gate has bottleneck / context_reduction channels inside
    dense_layers: tuple[int, ...]  # layers in each dense block
    dense_dilations: tuple[int, ...]
    segment_frames: int  # frames in a segment mean of the context

    def __post_init__(self) -> None:
        check_sizes(self, "speaker", layers=("head_blocks", "dense_layers"))
        if self.num_mel_bins % 8:
            raise MossError(f"speaker config: num_mel_bins is {self.num_mel_bins}, expected a multiple of 8")
        if not self.dense_layers:
            raise MossError("speaker config: dense_layers is empty, expected at least one block")
        if len(self.dense_layers) != len(self.dense_dilations):
            raise MossError(
                f"speaker config: {len(self.dense_layers)} dense_layers and {len(self.dense_dilations)} "
                "dense_dilations, expected the same number"
            )

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """The input channels of each dense block, and the output channels of the last transit layer."""
        channels = [self.init_channels]
        for layers in self.dense_layers:
            channels.append((channels[-1] + layers * self.growth_rate) // 2)
        return tuple(channels)


CAMPPLUS = SpeakerConfig(
    num_mel_bins=80,
    embedding_size=192,
    head_channels=32,
    head_blocks=(2, 2),
    init_channels=128,
    growth_rate=32,
    bottleneck=128,
    context_reduction=2,
    dense_layers=(12, 24, 16),
    dense_dilations=(1, 2, 2),
    segment_frames=100,
)

TINY = SpeakerConfig(
    num_mel_bins=16,
    embedding_size=12,
    head_channels=4,
    head_blocks=(2, 1),
    init_channels=8,
    growth_rate=4,
    bottleneck=8,
    context_reduction=2,
    dense_layers=(2, 1),
    dense_dilations=(1, 2),
    segment_frames=10,
)


class BatchNorm(nn.Module):
    """Batch normalisation of the last axis with stored statistics; scale and bias only if `affine`."""

    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        zeros = named(nn.initializers.zeros, "conv_out")
        ones = named(nn.initializers.ones, "conv_out")
        mean = self.param("mean", zeros, shape, jnp.float32)
        variance = self.param("var", ones, shape, jnp.float32)
        x = (x - over_last_axes(mean, x)) * over_last_axes(jax.lax.rsqrt(variance + EPSILON), x)
        if self.affine:
            scale = self.param("scale", ones, shape, jnp.float32)
            bias = self.param("bias", zeros, shape, jnp.float32)
            x = x * over_last_axes(scale, x) + over_last_axes(bias, x)
        return x


class Conv2d(nn.Module):
    """Convolution over [B, M, T, C] with zero padding that keeps T; `stride` is along M. Parameter: kernel."""

    features: int
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", (0, 1, 2), 3)
        shape = (self.width, self.width, x.shape[-1], self.features)
        kernel = self.param("kernel", named(init, None, None, "conv_in", "conv_out"), shape, jnp.float32)
        padding = [(self.width // 2, self.width // 2)] * 2
        return jax.lax.conv_general_dilated(
            x, kernel, (self.stride, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a convolution in the first block of a group."""

    channels: int
    first: bool

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array) -> jax.Array:
        stride = 2 if self.first else 1
        y = jax.nn.relu(BatchNorm(name="norm1")(Conv2d(self.channels, 3, stride, name="conv1")(x))) * keep
        y = BatchNorm(name="norm2")(Conv2d(self.channels, 3, name="conv2")(y))
        if self.first:
            x = BatchNorm(name="shortcut_norm")(Conv2d(self.channels, 1, stride, name="shortcut")(x))
        return jax.nn.relu(y + x) * keep


class Head(nn.Module):
    """Two-dimensional convolutions that divide the mel bins by 8: [B, T, M] -> [B, T, C * M / 8]."""

    config: SpeakerConfig

    @nn.compact
    def __call__(self, features: jax.Array, keep: jax.Array) -> jax.Array:
        channels = self.config.head_channels
        keep = rearrange(keep, "B T 1 -> B 1 T 1")
        x = rearrange(features, "B T M -> B M T 1")
        x = jax.nn.relu(BatchNorm(name="norm1")(Conv2d(channels, 3, name="conv1")(x))) * keep
        for group, blocks in enumerate(self.config.head_blocks, 1):
            for block in range(blocks):
                x = ResidualBlock(channels, block == 0, name=f"layer{group}_{block}")(x, keep)
        x = jax.nn.relu(BatchNorm(name="norm2")(Conv2d(channels, 3, 2, name="conv2")(x))) * keep
        return rearrange(x, "B M T C -> B T (C M)")


class DenseLayer(nn.Module):
    """New channels computed from all earlier ones and gated by their context: [B, T, C] -> [B, T, growth_rate]."""

    config: SpeakerConfig
    dilation: int

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array) -> jax.Array:
        config = self.config
        x = jax.nn.relu(BatchNorm(name="norm1")(x))
        x = Linear(config.bottleneck, ("conv_in", "conv_out"), use_bias=False, name="inner")(x)
        x = jax.nn.relu(BatchNorm(name="norm2")(x)) * keep
        padding = (self.dilation, self.dilation)
        y = Conv1d(config.growth_rate, 3, dilation=self.dilation, padding=padding, use_bias=False, name="local")(x)
        context = x.sum(1, keepdims=True) / keep.sum(1, keepdims=True) + self._segment_mean(x, keep)
        reduced = config.bottleneck // config.context_reduction
        context = jax.nn.relu(Linear(reduced, ("conv_in", "conv_out"), name="context1")(context))
        return y * jax.nn.sigmoid(Linear(config.growth_rate, ("conv_in", "conv_out"), name="context2")(context))

    def _segment_mean(self, x: jax.Array, keep: jax.Array) -> jax.Array:
        """The mean of each segment, repeated for its frames; that of the last one is over the frames that exist."""
        size = self.config.segment_frames
        frames = x.shape[1]

        def segment_sum(x: jax.Array) -> jax.Array:
            padded = jnp.pad(x, ((0, 0), (0, -frames % size), (0, 0)))
            return rearrange(padded, "B (segments size) C -> B segments size C", size=size).sum(2)

        mean = segment_sum(x) / jnp.maximum(segment_sum(keep), 1)
        return jnp.repeat(mean, size, axis=1)[:, :frames]


class CAMPPlus(nn.Module):
    """Mean-normalised filter banks -> speaker embedding."""

    config: SpeakerConfig

    @nn.compact
    def __call__(self, features: jax.Array, frames: jax.Array | None = None) -> jax.Array:
        """Features float32 [B, T, M], of which the first `frames` int [B] exist (None: all) -> [B, embedding_size]."""
        config = self.config
        if frames is None:
            frames = jnp.full(features.shape[:1], features.shape[1])
        keep = _mask(frames, features.shape[1])
        x = Head(config, name="head")(features * keep, keep)
        x = Conv1d(config.init_channels, 5, stride=2, padding=(2, 2), use_bias=False, name="tdnn")(x)
        frames = (frames + 1) // 2
        keep = _mask(frames, x.shape[1])
        x = jax.nn.relu(BatchNorm(name="tdnn_norm")(x))
        stages = zip(config.dense_layers, config.dense_dilations, config.stage_channels[1:], strict=True)
        for block, (layers, dilation, channels) in enumerate(stages, 1):
            for layer in range(1, layers + 1):
                new = DenseLayer(config, dilation, name=f"block{block}_{layer}")(x, keep)
                x = jnp.concatenate([x, new], -1)
            x = jax.nn.relu(BatchNorm(name=f"transit{block}_norm")(x))
            x = Linear(channels, ("conv_in", "conv_out"), use_bias=False, name=f"transit{block}")(x)
        x = jax.nn.relu(BatchNorm(name="out_norm")(x))
        count = frames[:, None]
        mean = (x * keep).sum(1) / count
        deviation = jnp.sqrt((jnp.square(x - mean[:, None]) * keep).sum(1) / (count - 1))
        statistics = jnp.concatenate([mean, deviation], -1)
        embedding = Linear(config.embedding_size, ("conv_in", "conv_out"), use_bias=False, name="dense")(statistics)
        return BatchNorm(affine=False, name="dense_norm")(embedding)


def _mask(frames: jax.Array, length: int) -> jax.Array:
    """float32 [B, length, 1]: 1 for the frames that exist."""
    return (jnp.arange(length)[None] < frames[:, None]).astype(jnp.float32)[..., None]


@partial(jax.jit, static_argnums=0)
def embed_padded(config: SpeakerConfig, params: Any, wave: jax.Array, frames: jax.Array) -> jax.Array:
    """Wave float32 [B, samples] at 16 kHz with `frames` int [B] filter bank frames -> [B, embedding_size]."""
    with jax.default_matmul_precision("highest"):
        fbank = kaldi_fbank(wave, replace(FBANK_16K, num_mel_bins=config.num_mel_bins))
        features = mean_normalized(fbank, frames)
        embedding = CAMPPlus(config).apply({"params": params}, features, frames)
    assert isinstance(embedding, jax.Array)  # `apply` may also return updated variables
    return embedding


def speaker_embedding(config: SpeakerConfig, params: Any, wave: np.ndarray) -> np.ndarray:
    """The speaker embedding of a recording.

    Args:
        params: nested parameters of CAM++.
        wave: float32 [samples], mono, 16 kHz, in [-1, 1].

    Returns:
        float32 [embedding_size].

    Raises:
        MossError: the recording is shorter than three filter bank frames (45 ms).
    """
    length = FBANK_16K.frame_length
    shift = FBANK_16K.frame_shift
    frames = 1 + (len(wave) - length) // shift
    if frames < MIN_FRAMES:
        raise MossError(
            f"a recording of {len(wave)} samples at 16 kHz is too short for a speaker embedding, expected at least "
            f"{length + (MIN_FRAMES - 1) * shift}"
        )
    bucket = 200  # frames, 2 s
    while bucket < frames:
        bucket *= 2
    padded = np.zeros((1, length + (bucket - 1) * shift), np.float32)
    used = length + (frames - 1) * shift
    padded[0, :used] = wave[:used]
    embedding: np.ndarray = np.asarray(embed_padded(config, params, jnp.asarray(padded), jnp.array([frames])))[0]
    return embedding


def init_params(config: SpeakerConfig, key: jax.Array) -> dict[str, Any]:
    """Random nested parameters of CAM++."""
    features = jnp.zeros((1, 2 * MIN_FRAMES, config.num_mel_bins))
    params: dict[str, Any] = nn.unbox(CAMPPlus(config).init(key, features))["params"]
    return params


@cache
def speaker_shapes(config: SpeakerConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat {path: ShapeDtypeStruct} of the parameters."""
    return param_shapes(CAMPPlus(config), jax.ShapeDtypeStruct((1, 200, config.num_mel_bins), jnp.float32))

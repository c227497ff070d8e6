"""The velocity field of the flow: residual convolution blocks and transformer blocks, all at the mel's rate.

Source: `CausalConditionalDecoder` of the released code and Matcha-TTS's blocks. One call serves the whole utterance
and a piece of a stream. R is the batch of rows: the conditional and the unconditional copies of each item.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_jax.nn.conv import CausalConv1d
from moss_jax.nn.layers import LayerNorm, Linear
from moss_jax.speech_decoder.flow.attention import Past, allowed, attend
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.encoder import CONV, tail_at

WIDTH = 3  # of all causal convolutions


def mish(x: jax.Array) -> jax.Array:
    """x * tanh(log(1 + e^x)) with one exponential."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU; `jax.nn.gelu` goes through erfc, which costs twice as much on a CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


class TimeEmbedding(nn.Module):
    """What the time adds inside each stage: [K, C] for `down` and `up`, [stages, K, C] for `mid`."""

    config: FlowConfig

    @nn.compact
    def __call__(self, t: jax.Array) -> dict[str, jax.Array]:
        """t float32 [K] in 0..1."""
        config = self.config.estimator
        sizes = ("time", "time_out")
        half = self.config.estimator_inputs // 2
        rates = jnp.exp(-jnp.log(10000.0) / (half - 1) * jnp.arange(half))
        angle = 1000 * t[:, None] * rates
        embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
        embedding = jax.nn.silu(Linear(config.time_size, sizes, name="linear_1")(embedding))
        embedding = mish(Linear(config.time_size, sizes, name="linear_2")(embedding))
        stacked = nn.vmap(
            Linear,
            in_axes=None,
            axis_size=config.num_mid_stages,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return {
            "down": Linear(config.channels, sizes, name="down")(embedding),
            "mid": stacked(config.channels, sizes, name="mid")(embedding),
            "up": Linear(config.channels, sizes, name="up")(embedding),
        }


class CausalBlock(nn.Module):
    """mask * mish(LN(conv(x * mask)))."""

    channels: int

    @nn.compact
    def __call__(self, x, mask, tail, length):
        """x [R, T, I], mask [R, T, 1], tail [R, 2, I] -> (y [R, T, C], the tail after `length` rows)."""
        x = x * mask
        y = CausalConv1d(self.channels, WIDTH, axes=CONV, name="conv")(x, tail)[0]
        return mish(LayerNorm(name="norm")(y)) * mask, tail_at(x, tail, length)


class ResidualBlock(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x, mask, time, tails, length):
        """x [R, T, I], time [R or 1, C] -> (y [R, T, C], tails)."""
        y, first = CausalBlock(self.channels, name="block1")(x, mask, tails[0], length)
        y, second = CausalBlock(self.channels, name="block2")(y + time[:, None], mask, tails[1], length)
        return y + Linear(self.channels, CONV, name="skip")(x * mask), (first, second)


class TransformerBlock(nn.Module):
    config: FlowConfig

    @nn.compact
    def __call__(self, x, layer, mask, past: Sequence[Past]):
        """x [R, T, C]; `layer` is the layer's index in the cache -> (x, (k, v)), k and v [R, N, T, H]."""
        config = self.config.estimator
        past = [part.replace(index=(*part.index, layer)) for part in past]
        y = LayerNorm(name="attention_norm")(x)
        split = (config.num_heads, config.head_dim)
        axes = ("embed", "heads", None)
        q, k, v = (Linear(split, axes, use_bias=False, name=name)(y) for name in ("q", "k", "v"))
        y = attend(q, k, v, mask, past)
        x = x + Linear(config.channels, ("heads", None, "embed"), in_dims=2, name="o")(y)
        y = gelu(Linear(config.intermediate_size, ("embed", "mlp"), name="up")(LayerNorm(name="mlp_norm")(x)))
        return x + Linear(config.channels, ("mlp", "embed"), name="down")(y), (
            k.transpose(0, 2, 1, 3),
            v.transpose(0, 2, 1, 3),
        )


class Stage(nn.Module):
    """A residual block and a stack of transformer blocks."""

    config: FlowConfig
    layer_axis: str | None = "layers"  # logical name of the stacked axis of the transformer blocks

    @nn.compact
    def __call__(self, x, inputs, mask, visible, length, past: Sequence[Past]):
        """x [R, T, I]; inputs = (index of the stage, time [R or 1, C], tails) -> (x [R, T, C], (tails, (k, v)))."""
        stage, time, tails = inputs
        config = self.config.estimator
        x, tails = ResidualBlock(config.channels, name="residual")(x, mask, time, tails, length)
        blocks = nn.scan(
            TransformerBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.num_blocks,
            metadata_params={nn.PARTITION_NAME: self.layer_axis},
        )(self.config, name="blocks")
        layers = stage * config.num_blocks + jnp.arange(config.num_blocks)
        x, keys = blocks(x, layers, visible, past)
        return x, (tails, keys)


def initial_tails(config: FlowConfig, rows: int) -> dict[str, Any]:
    """The convolutions' tails of an estimator call at the beginning of a stream, each [(stages,) rows, 2, channels]."""
    channels = config.estimator.channels
    stages = config.estimator.num_mid_stages

    def zeros(size, *lead):
        return jnp.zeros((*lead, rows, WIDTH - 1, size))

    return {
        "down": (zeros(config.estimator_inputs), zeros(channels)),
        "down_out": zeros(channels),
        "mid": (zeros(channels, stages), zeros(channels, stages)),
        "up": (zeros(2 * channels), zeros(channels)),
        "up_out": zeros(channels),
        "final": zeros(channels),
    }


class Estimator(nn.Module):
    config: FlowConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mu: jax.Array,
        speaker: jax.Array,
        prompt: jax.Array,
        time: dict[str, jax.Array],
        valid: jax.Array,
        chunk: int | jax.Array | None = None,
        tails: dict[str, Any] | None = None,
        length: jax.Array | int = 0,
        past: Sequence[Past] = (),
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The velocity of T mel frames.

        Args:
            x, mu, prompt: the state, the encoder's projection, the prompt's mel (zero elsewhere), float32 [R, T, M].
            speaker: float32 [R, M], the projected speaker embedding.
            time: `TimeEmbedding` of one time (K = 1) or of one a row (K = R).
            valid: which frames exist, bool [R, T].
            chunk: mel frames in a chunk of the static mask, one number or int32 [R], or None for attention without it.
            tails: convolution tails (see `initial_tails`) after the calls before; None at the beginning.
            length: the tails that come back are those after so many of the T frames.
            past: caches of the attention layers.

        Returns:
            velocity float32 [R, T, M], and a dictionary of `tails` and `keys` = (k, v) [L, R, N, T, H].
        """
        config = self.config.estimator
        rows, frames = valid.shape
        tails = initial_tails(self.config, rows) if tails is None else tails
        mask = valid[..., None].astype(x.dtype)
        visible = allowed(frames, valid, chunk)
        conv = [CausalConv1d(config.channels, WIDTH, axes=CONV, name=name) for name in ("down_out", "up_out")]
        new = {}
        keys = {}
        common = (mask, visible, length, past)

        with jax.named_scope("down"):
            speaker = jnp.broadcast_to(speaker[:, None], (rows, frames, speaker.shape[-1]))
            x = jnp.concatenate([x, mu, speaker, prompt], -1)
            x, (new["down"], keys["down"]) = Stage(self.config, name="down")(
                x, (0, time["down"], tails["down"]), *common
            )
            skip = x
            x = x * mask
            new["down_out"] = tail_at(x, tails["down_out"], length)
            x = conv[0](x, tails["down_out"])[0]
        with jax.named_scope("mid"):
            stages = nn.scan(
                Stage,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=config.num_mid_stages,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(self.config, layer_axis=None, name="mid")
            inputs = (1 + jnp.arange(config.num_mid_stages), time["mid"], tails["mid"])
            x, (new["mid"], keys["mid"]) = stages(x, inputs, *common)
        with jax.named_scope("up"):
            x = jnp.concatenate([x, skip], -1)
            x, (new["up"], keys["up"]) = Stage(self.config, name="up")(
                x, (config.num_stages - 1, time["up"], tails["up"]), *common
            )
            x = x * mask
            new["up_out"] = tail_at(x, tails["up_out"], length)
            x = conv[1](x, tails["up_out"])[0]
        with jax.named_scope("final"):
            x, new["final"] = CausalBlock(config.channels, name="final")(x, mask, tails["final"], length)
            x = Linear(self.config.mel_bins, (*CONV,), name="final_out")(x * mask) * mask
        mid = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), keys["mid"])
        keys = jax.tree.map(lambda *parts: jnp.concatenate(parts), keys["down"], mid, keys["up"])
        return x, {"tails": new, "keys": keys}

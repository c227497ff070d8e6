"""The estimator of the flow: residual convolution blocks and transformer blocks, all at the mel's rate.

Source: `CausalConditionalDecoder` of the released code and the blocks of Matcha-TTS. One call computes a whole
utterance or a piece of a stream. The batch B holds `config.rows` rows for each item: with guidance a conditional and an
unconditional one.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from moss_jax.nn.attention import Past, chunk_mask, masked_attention
from moss_jax.nn.conv import CausalConv1d, tail_after
from moss_jax.nn.layers import LayerNorm, Linear
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.encoder import CONV, Keys

WIDTH = 3  # W, of all causal convolutions
Tails = tuple[jax.Array, jax.Array]  # of the two convolutions of a residual block


def mish(x: jax.Array) -> jax.Array:
    """x * tanh(log(1 + e^x)) with one exponential."""
    e = jnp.exp(jnp.minimum(x, 20.0))  # above 20 the factor is 1 in float32, and e^x may overflow
    n = e * (e + 2)
    return x * (n / (n + 2))


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU; `jax.nn.gelu` goes through erfc, which costs twice as much on a CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


class TimeEmbedding(nn.Module):
    """The term that the time adds in each stage: [B, C] for `down` and `up`, [stages, B, C] for `mid`."""

    config: FlowConfig

    @nn.compact
    def __call__(self, t: jax.Array) -> dict[str, jax.Array]:
        """t: float32 [B], times in 0..1."""
        config = self.config.estimator
        sizes = ("time", "time_out")
        half = self.config.estimator_inputs // 2
        rates = jnp.exp(-jnp.log(10000.0) / (half - 1) * jnp.arange(half))
        angle = 1000 * t[:, None] * rates[None]  # times count in thousandths, as in the reference
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
    def __call__(
        self, x: jax.Array, mask: jax.Array, tail: jax.Array, length: jax.Array | int
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, T, in], mask [B, T, 1], tail [B, W - 1, in] -> (y [B, T, C], the tail after `length` rows)."""
        x = x * mask
        y = CausalConv1d(self.channels, WIDTH, axes=CONV, name="conv")(x, tail)
        return mish(LayerNorm(name="norm")(y)) * mask, tail_after(x, tail, length)


class ResidualBlock(nn.Module):
    channels: int

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, time: jax.Array, tails: Tails, length: jax.Array | int
    ) -> tuple[jax.Array, Tails]:
        """x [B, T, in], time [B or 1, C] -> (y [B, T, C], the tails after `length` rows)."""
        y, first = CausalBlock(self.channels, name="block1")(x, mask, tails[0], length)
        y, second = CausalBlock(self.channels, name="block2")(y + time[:, None], mask, tails[1], length)
        return y + Linear(self.channels, CONV, name="skip")(x * mask), (first, second)


class TransformerBlock(nn.Module):
    config: FlowConfig

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, mask: jax.Array, past: Sequence[Past]) -> tuple[jax.Array, Keys]:
        """x [B, T, C] -> (x, new keys and values). `layer`: int32, its index in the caches."""
        config = self.config.estimator
        past = [part.replace(index=(*part.index, layer)) for part in past]
        y = LayerNorm(name="attention_norm")(x)
        split = (config.num_heads, config.head_dim)
        axes = ("embed", "heads", None)
        q = Linear(split, axes, use_bias=False, name="q")(y)
        k = Linear(split, axes, use_bias=False, name="k")(y)
        v = Linear(split, axes, use_bias=False, name="v")(y)
        y = masked_attention(q, k, v, mask, past)
        x = x + Linear(config.channels, ("heads", None, "embed"), in_dims=2, name="o")(y)
        y = LayerNorm(name="mlp_norm")(x)
        y = gelu(Linear(config.intermediate_size, ("embed", "mlp"), name="up")(y))
        x = x + Linear(config.channels, ("mlp", "embed"), name="down")(y)
        return x, (rearrange(k, "B T N H -> B N T H"), rearrange(v, "B T N H -> B N T H"))


class Stage(nn.Module):
    """A residual block and a stack of transformer blocks."""

    config: FlowConfig
    layer_axis: str | None = "layers"  # logical name of the stacked axis of the transformer blocks

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        inputs: tuple[jax.Array | int, jax.Array, Tails],
        mask: jax.Array,
        visible: jax.Array,
        length: jax.Array | int,
        past: Sequence[Past],
    ) -> tuple[jax.Array, tuple[Tails, Keys]]:
        """The stage, shaped for `nn.scan`.

        Args:
            x: [B, T, in].
            inputs: (index of the stage, time [B or 1, C], tails).
            mask: float32 [B, T, 1], the frames that exist.
            visible: bool [B, T, T], the mask of attention.
            length: the tails that are returned are those after this many frames.
            past: caches of the attention layers.

        Returns:
            (x [B, T, C], (tails, new keys and values [blocks, B, N, T, H]))
        """
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
    """The tails of the convolutions at the start of a stream, each [(stages,) rows, W - 1, channels]."""
    channels = config.estimator.channels
    stages = config.estimator.num_mid_stages

    def zeros(size: int, *lead: int) -> jax.Array:
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
        """The prediction for T mel frames: the velocity, or what `FlowConfig.predicts` says.

        Args:
            x, mu, prompt: the state, the encoder's projection, the prompt's mel (zero elsewhere), float32 [B, T, M].
            speaker: float32 [B, M], the projected speaker embedding.
            time: `TimeEmbedding` of one time for all rows or of one for each.
            valid: bool [B, T], the frames that exist.
            chunk: mel frames in a chunk of the static mask, one number or int32 [B]; None: no chunk mask.
            tails: of the convolutions after the previous call; None at the start (see `initial_tails`).
            length: the tails that are returned are those after this many of the T frames.
            past: caches of the attention layers.

        Returns:
            (prediction float32 [B, T, M], {"tails": ..., "keys": new keys and values [L, B, N, T, H]})
        """
        config = self.config.estimator
        rows, frames = valid.shape
        tails = initial_tails(self.config, rows) if tails is None else tails
        mask = valid[..., None].astype(x.dtype)
        visible = chunk_mask(frames, valid, chunk)
        new: dict[str, Any] = {}
        keys: dict[str, Keys] = {}
        common = (mask, visible, length, past)

        with jax.named_scope("down"):
            speaker = jnp.broadcast_to(speaker[:, None], (rows, frames, speaker.shape[-1]))
            x = jnp.concatenate([x, mu, speaker, prompt], -1)
            x, (new["down"], keys["down"]) = Stage(self.config, name="down")(
                x, (0, time["down"], tails["down"]), *common
            )
            skip = x
            x = x * mask
            new["down_out"] = tail_after(x, tails["down_out"], length)
            x = CausalConv1d(config.channels, WIDTH, axes=CONV, name="down_out")(x, tails["down_out"])
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
            new["up_out"] = tail_after(x, tails["up_out"], length)
            x = CausalConv1d(config.channels, WIDTH, axes=CONV, name="up_out")(x, tails["up_out"])
        with jax.named_scope("final"):
            x, new["final"] = CausalBlock(config.channels, name="final")(x, mask, tails["final"], length)
            x = Linear(self.config.mel_bins, CONV, name="final_out")(x * mask) * mask
        mid = jax.tree.map(lambda x: rearrange(x, "stages blocks ... -> (stages blocks) ..."), keys["mid"])
        all_keys = jax.tree.map(lambda *parts: jnp.concatenate(parts), keys["down"], mid, keys["up"])
        return x, {"tails": new, "keys": all_keys}

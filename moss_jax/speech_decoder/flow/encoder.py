"""The upsampling conformer: embedded codes at 12.5 Hz -> states at the mel's 50 Hz.

Source: `UpsampleConformerEncoder` of the released code. One call encodes a whole utterance or a piece of a stream: a
stream passes the tails of its convolutions and its cached keys and values, and gets the new ones.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from moss_jax.nn.attention import Past, chunk_mask, masked_attention
from moss_jax.nn.conv import CausalConv1d, Conv1d, tail_after
from moss_jax.nn.layers import LayerNorm, Linear, named, over_last_axes
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.positions import relative_query, sinusoids

CONFORMER_EPSILON = 1e-12  # of the layer norms inside the layers, as in the reference; 1e-5 elsewhere
CONV = ("conv_in", "conv_out")
Keys = tuple[jax.Array, jax.Array]  # new keys and values of attention layers, each [(L,) B, N, T, H]


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions."""

    num_heads: int

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, positions: jax.Array, past: Sequence[Past]
    ) -> tuple[jax.Array, Keys]:
        """x [B, T, D], mask bool [B, T, T], positions [T, D] -> (y [B, T, D], new keys and values)."""
        size = x.shape[-1]
        heads = self.num_heads
        split = (heads, size // heads)
        axes = ("embed", "heads", None)
        q = Linear(split, axes, name="q")(x)
        k = Linear(split, axes, name="k")(x)
        v = Linear(split, axes, name="v")(x)
        normal = named(nn.initializers.normal(0.02), "heads", None)
        bias_u = self.param("bias_u", normal, split, jnp.float32)
        bias_v = self.param("bias_v", normal, split, jnp.float32)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", 0, (1, 2))
        position = self.param("position", named(init, *axes), (size, *split), jnp.float32)
        position_q = relative_query(q + over_last_axes(bias_v, q), position, positions)
        y = masked_attention(q + over_last_axes(bias_u, q), k, v, mask, past, position_q, positions)
        y = Linear(size, ("heads", None, "embed"), in_dims=2, name="o")(y)
        return y, (rearrange(k, "B T N H -> B N T H"), rearrange(v, "B T N H -> B N T H"))


class ConformerLayer(nn.Module):
    config: FlowConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: jax.Array, mask: jax.Array, positions: jax.Array, past: Sequence[Past]
    ) -> tuple[jax.Array, Keys]:
        """x [B, T, D] -> (x, new keys and values). `layer`: int32, its index in the caches."""
        config = self.config.encoder
        past = [part.replace(index=(*part.index, layer)) for part in past]
        y = LayerNorm(CONFORMER_EPSILON, name="attention_norm")(x)
        y, keys = RelativeAttention(config.num_heads, name="attention")(y, mask, positions, past)
        x = x + y
        y = LayerNorm(CONFORMER_EPSILON, name="mlp_norm")(x)
        y = jax.nn.silu(Linear(config.intermediate_size, ("embed", "mlp"), name="up")(y))
        return x + Linear(config.hidden_size, ("mlp", "embed"), name="down")(y), keys


def conformer_layers(config: FlowConfig, length: int, name: str) -> Any:
    """`length` layers as one scanned module."""
    return nn.scan(
        ConformerLayer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, name=name)


class Embedding(nn.Module):
    """A linear layer, a layer norm, and a factor sqrt(D)."""

    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = LayerNorm(name="norm")(Linear(self.size, ("embed", None), name="linear")(x))
        scaled: jax.Array = x * self.size**0.5
        return scaled


def initial_encoder_tails(config: FlowConfig, batch: int) -> dict[str, jax.Array]:
    """The tails of the convolutions at the start of a stream."""
    size = config.encoder.hidden_size
    frames = config.frames_per_code
    return {"lookahead": jnp.zeros((batch, 2, size)), "upsample": jnp.zeros((batch, 2 * frames, size))}


class Encoder(nn.Module):
    config: FlowConfig

    def setup(self) -> None:
        size = self.config.encoder.hidden_size
        config = self.config
        self.embedding = Embedding(size)
        self.lookahead = Conv1d(size, config.lookahead + 1, axes=CONV)
        self.lookahead_out = CausalConv1d(size, 3, axes=CONV)
        self.layers = conformer_layers(config, config.encoder.num_layers, "layers")
        self.upsample = CausalConv1d(size, 2 * config.frames_per_code + 1, axes=CONV)
        self.up_embedding = Embedding(size)
        self.up_layers = conformer_layers(config, config.encoder.num_up_layers, "up_layers")
        self.norm = LayerNorm()

    def embed(self, x: jax.Array) -> jax.Array:
        """Rows of the code table [B, T, D] -> what `__call__` takes, [B, T, D]."""
        return self.embedding(x)

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        chunk: int | jax.Array | None = None,
        tails: dict[str, jax.Array] | None = None,
        start: jax.Array | int = 0,
        length: jax.Array | int = 0,
        past: Sequence[Past] = (),
        up_past: Sequence[Past] = (),
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The states of T codes.

        Args:
            x: `embed` of the T codes and the `lookahead` ones after them, float32 [B, T + lookahead, D]; zeros after
                the end of an utterance, as in the reference.
            valid: bool [B, T], the codes that are visible to attention.
            chunk: codes in a chunk of the static mask, one number or int32 [B]; None: no chunk mask.
            tails: of the convolutions after the previous call; None at the start.
            start: absolute position of the first code, at the start of a chunk.
            length: the tails that are returned are those after this many of the T codes.
            past, up_past: caches of the layers at the code rate and at the mel's.

        Returns:
            (states float32 [B, T * frames_per_code, D], {"tails": ..., "keys": new keys and values at the code rate,
            "up_keys": those at the mel's})
        """
        config = self.config
        frames = self.config.frames_per_code
        codes = valid.shape[1]
        tails = initial_encoder_tails(config, x.shape[0]) if tails is None else tails
        with jax.named_scope("lookahead"):
            ahead = jax.nn.leaky_relu(self.lookahead(x), 0.01)
            x = x[:, :codes] + self.lookahead_out(ahead, tails["lookahead"])
        with jax.named_scope("code_layers"):
            positions = sinusoids(start + jnp.arange(codes), config.encoder.hidden_size)
            mask = chunk_mask(codes, valid, chunk)
            x, keys = self.layers(x, jnp.arange(config.encoder.num_layers), mask, positions, past)
        with jax.named_scope("upsample"):
            repeated = jnp.repeat(x, frames, 1)
            x = self.up_embedding(self.upsample(repeated, tails["upsample"]))
        with jax.named_scope("frame_layers"):
            positions = sinusoids(start * frames + jnp.arange(codes * frames), config.encoder.hidden_size)
            mask = chunk_mask(codes * frames, jnp.repeat(valid, frames, 1), None if chunk is None else chunk * frames)
            x, up_keys = self.up_layers(x, jnp.arange(config.encoder.num_up_layers), mask, positions, up_past)
        tails = {
            "lookahead": tail_after(ahead, tails["lookahead"], length),
            "upsample": tail_after(repeated, tails["upsample"], length * frames),
        }
        return self.norm(x), {"tails": tails, "keys": keys, "up_keys": up_keys}

"""The upsampling conformer: embedded codes at 12.5 Hz -> states at the mel's 50 Hz.

Source: `UpsampleConformerEncoder` of the released code. One call serves the whole utterance and a piece of a stream:
a stream hands in the tails of its convolutions and the cached keys and values, and gets the new ones back.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_jax.nn.conv import CausalConv1d, Conv1d
from moss_jax.nn.layers import LayerNorm, Linear, named
from moss_jax.speech_decoder.flow.attention import Past, allowed, attend, relative, sinusoids
from moss_jax.speech_decoder.flow.config import FlowConfig

CONFORMER_EPSILON = 1e-12  # of the layer norms inside the layers; 1e-5 elsewhere
CONV = ("conv_in", "conv_out")


def tail_at(x: jax.Array, tail: jax.Array, length: jax.Array) -> jax.Array:
    """The tail [B, K, C] that a causal convolution needs after the first `length` rows of x, given the tail before."""
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate([tail, x], 1), length, tail.shape[1], 1)


class RelativeAttention(nn.Module):
    """Multi-head self-attention whose scores know how far the key is from the query."""

    num_heads: int

    @nn.compact
    def __call__(self, x, mask, turn, past: Sequence[Past] = ()):
        """x [B, T, D], mask bool [B, T, T], turn [T, D] -> (y [B, T, D], (k, v) [B, N, T, H])."""
        size = x.shape[-1]
        heads = self.num_heads
        split = (heads, size // heads)
        axes = ("embed", "heads", None)
        q, k, v = (Linear(split, axes, name=name)(x) for name in ("q", "k", "v"))
        bias_u, bias_v = (
            self.param(name, named(nn.initializers.normal(0.02), "heads", None), split, jnp.float32)
            for name in ("bias_u", "bias_v")
        )
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", 0, (1, 2))
        position = self.param("position", named(init, *axes), (size, *split), jnp.float32)
        y = attend(q + bias_u, k, v, mask, past, relative(q + bias_v, position, turn), turn)
        return Linear(size, ("heads", None, "embed"), in_dims=2, name="o")(y), (
            k.transpose(0, 2, 1, 3),
            v.transpose(0, 2, 1, 3),
        )


class ConformerLayer(nn.Module):
    config: FlowConfig

    @nn.compact
    def __call__(self, x, layer, mask, turn, past: Sequence[Past]):
        """x [B, T, D]; `layer` is this layer's index in the cache -> (x, (k, v))."""
        config = self.config.encoder
        past = [part.replace(index=(*part.index, layer)) for part in past]
        y = LayerNorm(CONFORMER_EPSILON, name="attention_norm")(x)
        y, keys = RelativeAttention(config.num_heads, name="attention")(y, mask, turn, past)
        x = x + y
        y = LayerNorm(CONFORMER_EPSILON, name="mlp_norm")(x)
        y = jax.nn.silu(Linear(config.intermediate_size, ("embed", "mlp"), name="up")(y))
        return x + Linear(config.hidden_size, ("mlp", "embed"), name="down")(y), keys


def conformer_layers(config: FlowConfig, length: int, name: str):
    return nn.scan(
        ConformerLayer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, name=name)


class Embedding(nn.Module):
    """Linear, layer norm, times sqrt(D)."""

    size: int

    @nn.compact
    def __call__(self, x):
        x = LayerNorm(name="norm")(Linear(self.size, ("embed", None), name="linear")(x))
        return x * self.size**0.5


def initial_encoder_tails(config: FlowConfig, batch: int) -> dict[str, jax.Array]:
    """The convolutions' tails at the beginning of a stream."""
    size = config.encoder.hidden_size
    frames = config.frames_per_code
    return {"lookahead": jnp.zeros((batch, 2, size)), "upsample": jnp.zeros((batch, 2 * frames, size))}


class Encoder(nn.Module):
    config: FlowConfig

    def setup(self):
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
            x: `embed` of the T codes and the `lookahead` ones after them, float32 [B, T + lookahead, D]. Beyond the
                end of an utterance the reference has zeros here.
            valid: which of the T codes may be seen by attention, bool [B, T].
            chunk: codes in a chunk of the static mask, one number or int32 [B], or None for attention without it.
            tails: tails of the convolutions after the calls before; None at the beginning.
            start: absolute position of the first code, at the beginning of a chunk.
            length: the tails that come back are those after so many of the T codes.
            past, up_past: caches of the layers at the code rate and at the mel's.

        Returns:
            states float32 [B, T * frames_per_code, D], and a dictionary of `tails`, `keys` = (k, v)
            [L, B, N, T, H] at the code rate and `up_keys` at the mel's.
        """
        config = self.config
        frames = self.config.frames_per_code
        codes = valid.shape[1]
        tails = initial_encoder_tails(config, x.shape[0]) if tails is None else tails
        with jax.named_scope("lookahead"):
            ahead = jax.nn.leaky_relu(self.lookahead(x), 0.01)
            x = x[:, :codes] + self.lookahead_out(ahead, tails["lookahead"])[0]
        with jax.named_scope("code_layers"):
            turn = sinusoids(start + jnp.arange(codes), config.encoder.hidden_size)
            mask = allowed(codes, valid, chunk)
            x, keys = self.layers(x, jnp.arange(config.encoder.num_layers), mask, turn, past)
        with jax.named_scope("upsample"):
            raised = jnp.repeat(x, frames, 1)
            x = self.up_embedding(self.upsample(raised, tails["upsample"])[0])
        with jax.named_scope("frame_layers"):
            turn = sinusoids(start * frames + jnp.arange(codes * frames), config.encoder.hidden_size)
            mask = allowed(codes * frames, jnp.repeat(valid, frames, 1), None if chunk is None else chunk * frames)
            x, up_keys = self.up_layers(x, jnp.arange(config.encoder.num_up_layers), mask, turn, up_past)
        tails = {
            "lookahead": tail_at(ahead, tails["lookahead"], length),
            "upsample": tail_at(raised, tails["upsample"], length * frames),
        }
        return self.norm(x), {"tails": tails, "keys": keys, "up_keys": up_keys}

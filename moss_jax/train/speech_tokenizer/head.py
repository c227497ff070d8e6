"""The networks on top of the codes while a speech tokenizer is trained.

Bidirectional layers over the whole clip, a recogniser (CTC, or the decoder of Whisper), and a small network that
reconstructs the log-mel.

Dimension letters: B batch, T codes, N units of a transcript, D width, C width of a code's vector, V units, M mel bins.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_jax.nn.attention import masked_attention
from moss_jax.nn.layers import Embed, LayerNorm, Linear, named
from moss_jax.nn.tree import param_shapes
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.train.speech_tokenizer.run import Objective

QKV = ("embed", "heads", "head_dim")
OUT = ("heads", "head_dim", "embed")


class Layer(nn.Module):
    """Whisper's layer: self-attention, in the decoder attention to the encoder, feed-forward; all pre-norm.

    Shaped for `nn.scan`. Masks are bool, broadcast to [B, queries, keys].
    """

    config: SpeechTokenizerConfig
    cross: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, memory: jax.Array | None, memory_mask: jax.Array | None
    ) -> tuple[jax.Array, None]:
        config = self.config
        y = LayerNorm(config.layer_norm_epsilon, name="attention_norm")(x)
        x = x + self._attention("", y, y, mask)
        if self.cross:
            assert memory is not None and memory_mask is not None
            y = LayerNorm(config.layer_norm_epsilon, name="cross_norm")(x)
            x = x + self._attention("cross_", y, memory, memory_mask)
        y = LayerNorm(config.layer_norm_epsilon, name="mlp_norm")(x)
        y = jax.nn.gelu(Linear(config.encoder_ffn_dim, ("embed", "mlp"), name="up")(y), approximate=False)
        return x + Linear(config.d_model, ("mlp", "embed"), name="down")(y), None

    def _attention(self, prefix: str, x: jax.Array, memory: jax.Array, mask: jax.Array) -> jax.Array:
        heads = (self.config.encoder_attention_heads, self.config.head_dim)
        q = Linear(heads, QKV, name=f"{prefix}q")(x)
        k = Linear(heads, QKV, use_bias=False, name=f"{prefix}k")(memory)
        v = Linear(heads, QKV, name=f"{prefix}v")(memory)
        y = masked_attention(q, k, v, mask)
        return Linear(self.config.d_model, OUT, in_dims=2, name=f"{prefix}o")(y)


class Head(nn.Module):
    """Everything that is trained on top of the encoder. `units` is the number of text units."""

    config: SpeechTokenizerConfig
    objective: Objective
    units: int

    def setup(self) -> None:
        config = self.config
        objective = self.objective
        if config.code_dim != config.d_model:
            self.lift = Linear(config.d_model, ("code", "embed"))
        self.layers = _stack(objective.layers)(config)
        self.norm = LayerNorm(config.layer_norm_epsilon)
        self.mel_hidden = Linear(objective.mel_hidden, ("code", "mlp"))
        self.mel_out = Linear(config.frames_per_code * config.num_mel_bins, ("mlp", None))
        if objective.head == "ctc":
            self.ctc = Linear(self.units, ("embed", "vocab"))
            return
        self.embed = Embed(self.units, config.d_model)
        normal = named(nn.initializers.normal(0.02), None, "embed")
        self.positions = self.param("positions", normal, (objective.max_units, config.d_model))
        self.decoder_layers = _stack(objective.decoder_layers)(config, cross=True)
        self.decoder_norm = LayerNorm(config.layer_norm_epsilon)

    def __call__(self, vectors: jax.Array, valid: jax.Array, units: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(logits of the recogniser, log-mel) of code vectors; for the initialisation of parameters.

        Args:
            vectors: [2, B, T, C]; those of the codes, and the same with their positions added.
            valid: bool [B, T].
            units: int32 [B, N], the transcript so far, for the attention head.
        """
        codes, with_positions = vectors
        memory = self.memory(with_positions, valid)
        logits = self.ctc(memory) if self.objective.head == "ctc" else self.decode(units, memory, valid)
        return logits, self.mel(codes)

    def memory(self, vectors: jax.Array, valid: jax.Array) -> jax.Array:
        """Vectors of codes with their positions [B, T, C] -> [B, T, D], each with the context of the whole clip."""
        x = self.lift(vectors) if self.config.code_dim != self.config.d_model else vectors
        x, _ = self.layers(x, valid[:, None], None, None)
        return self.norm(x)

    def ctc_logits(self, memory: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, V]."""
        return self.ctc(memory)

    def decode(self, units: jax.Array, memory: jax.Array, valid: jax.Array) -> jax.Array:
        """Units so far [B, N], the encoder's output [B, T, D] -> logits of the next unit at each position [B, N, V]."""
        length = units.shape[1]
        x = self.embed(units) + self.positions[None, :length]
        causal = jnp.tril(jnp.ones((length, length), bool))[None]
        x, _ = self.decoder_layers(x, causal, memory, valid[:, None])
        return self.decoder_norm(x) @ self.embed(jnp.arange(self.units)).T

    def mel(self, vectors: jax.Array) -> jax.Array:
        """Vectors of codes without their positions [B, T, C] -> log-mel [B, T * frames_per_code, M].

        The frames of a code are predicted from it and its two neighbours.
        """
        padded = jnp.pad(vectors, ((0, 0), (1, 1), (0, 0)))
        x = jnp.concatenate([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], -1)
        y = self.mel_out(jax.nn.gelu(self.mel_hidden(x), approximate=False))
        return y.reshape(y.shape[0], -1, self.config.num_mel_bins)


def _stack(layers: int) -> Any:
    return nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _inputs(config: SpeechTokenizerConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.zeros((2, 1, 4, config.code_dim)), jnp.ones((1, 4), bool), jnp.zeros((1, 3), jnp.int32)


def head_shapes(head: Head) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat {path: shape} of the head's parameters."""
    return param_shapes(head, *_inputs(head.config))


def init_head(head: Head, key: jax.Array) -> dict[str, Any]:
    """Random parameters, as a nested dictionary."""
    return nn.unbox(head.init(key, *_inputs(head.config)))["params"]

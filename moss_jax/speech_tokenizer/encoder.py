"""The causal Whisper-VQ encoder: log-mel frames at 100 Hz -> codes at 12.5 Hz (codec specification, section 3).

Dimension letters: B batch, T log-mel frames or encoder frames, S cached encoder frames, M mel bins, D embed, N heads,
H head size, L layers, V codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from moss_jax.nn.attention import Past, causal_attention, masked_attention
from moss_jax.nn.conv import CausalConv1d, tail_after
from moss_jax.nn.layers import LayerNorm, Linear, named
from moss_jax.nn.quantize import nearest_codes, unit
from moss_jax.nn.tree import param_shapes
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig

# The amplitude of new positions. Whisper's is 1; a fifth of it is about the size of what new convolutions give, and
# with it the loss of a small encoder falls sooner (docs/speech_tokenizer_training.md).
POSITION_SCALE = 0.2


class EncoderState(struct.PyTreeNode):
    """The state of streams.

    Attributes:
        conv1: float32 [B, 2, M], the tail of the first convolution.
        conv2: float32 [B, 2, D], that of the second.
        k, v: float32 [L, B, N, S, H], keys and values, S = max_source_positions. A head is contiguous, which is faster.
        position: int32 [B], encoder frames done in the current segment.
    """

    conv1: jax.Array
    conv2: jax.Array
    k: jax.Array
    v: jax.Array
    position: jax.Array


def init_state(config: SpeechTokenizerConfig, batch: int) -> EncoderState:
    """The initial state of `batch` streams."""
    heads = (config.encoder_attention_heads, config.max_source_positions, config.head_dim)
    return EncoderState(
        conv1=jnp.zeros((batch, 2, config.num_mel_bins)),
        conv2=jnp.zeros((batch, 2, config.d_model)),
        k=jnp.zeros((config.num_layers, batch, *heads)),
        v=jnp.zeros((config.num_layers, batch, *heads)),
        position=jnp.zeros((batch,), jnp.int32),
    )


def _scaled_sinusoids(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Initialises positions [length, width], with which attention finds neighbours from the first step."""
    return POSITION_SCALE * _sinusoids(*shape).astype(dtype)


def _sinusoids(length: int, width: int) -> jax.Array:
    """Positions as in Whisper's encoder: sines, then cosines, of wavelengths from 2 pi to 20,000 pi frames."""
    rates = jnp.exp(-jnp.log(10000.0) / (width // 2 - 1) * jnp.arange(width // 2))
    angles = jnp.arange(length)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def _unit_sinusoids(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Initialises positions [length, width] of length 1."""
    positions: jax.Array = (2 / shape[1]) ** 0.5 * _sinusoids(*shape).astype(dtype)
    return positions


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward. Shaped for `nn.scan`: (x, layer) -> (x, new keys and values)."""

    config: SpeechTokenizerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: jax.Array | None, past: Past | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """The next rows of a segment, all of them when `past` is None.

        Args:
            x: [B, T, D].
            layer: int32, the index of this layer in the cache.
            past: the cache of all layers.

        Returns:
            [B, T, D], and in a stream the keys and values of the rows, each [B, N, T, H].
        """
        config = self.config
        heads = (config.encoder_attention_heads, config.head_dim)
        axes = ("embed", "heads", "head_dim")
        y = LayerNorm(config.layer_norm_epsilon, name="attention_norm")(x)
        q = Linear(heads, axes, name="q")(y)
        k = Linear(heads, axes, use_bias=False, name="k")(y)
        v = Linear(heads, axes, name="v")(y)
        new = None
        if past is None:
            y = causal_attention(q, k, v)
        else:
            causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
            y = masked_attention(q, k, v, causal[None], (past.replace(index=(layer,)),))
            new = rearrange(k, "B T N H -> B N T H"), rearrange(v, "B T N H -> B N T H")
        x = x + Linear(config.d_model, ("heads", "head_dim", "embed"), in_dims=2, name="o")(y)
        y = LayerNorm(config.layer_norm_epsilon, name="mlp_norm")(x)
        y = jax.nn.gelu(Linear(config.encoder_ffn_dim, ("embed", "mlp"), name="up")(y), approximate=False)
        x = x + Linear(config.d_model, ("mlp", "embed"), name="down")(y)
        return x, new


class Encoder(nn.Module):
    """Convolutions, scanned layers, average pooling, nearest codes."""

    config: SpeechTokenizerConfig

    def setup(self) -> None:
        config = self.config
        self.conv1 = CausalConv1d(config.d_model, 3, axes=("mel", "embed"))
        self.conv2 = CausalConv1d(config.d_model, 3, stride=2, axes=("conv_in", "embed"))
        self.layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        if config.code_dim != config.d_model:
            self.project = Linear(config.code_dim, ("embed", "code"))
        positions = config.max_source_positions
        codes = config.quantize_vocab_size
        self.positions = self.param("positions", named(_scaled_sinusoids, None, "embed"), (positions, config.d_model))
        # Positions that are added to codes of length 1 have the same length.
        code_positions = _unit_sinusoids if config.normalize_codes else _scaled_sinusoids
        self.code_positions = self.param(
            "code_positions", named(code_positions, None, "code"), (config.codes_per_segment, config.code_dim)
        )
        self.codebook = self.param(
            "codebook", named(nn.initializers.normal(1.0), "vocab", "code"), (codes, config.code_dim)
        )

    def __call__(self, frames: jax.Array) -> jax.Array:
        """Log-mel frames [B, T, M] of one segment -> codes int32 [B, ceil(T / frames_per_code)]."""
        return self.quantize(self.pooled(frames))

    def pooled(self, frames: jax.Array) -> jax.Array:
        """Log-mel frames [B, T, M] of one segment -> the vectors before the quantiser, [B, T', D]."""
        if frames.shape[1] % 2:
            frames = jnp.pad(frames, ((0, 0), (0, 1), (0, 0)))
        with jax.named_scope("convolutions"):
            x = jax.nn.gelu(self.conv1(frames), approximate=False)
            x = jax.nn.gelu(self.conv2(x), approximate=False)
        x = x + self.positions[None, : x.shape[1]]
        with jax.named_scope("layers"):
            x, _ = self.layers(x, None, None)
        return self._pool(x)

    def _pool(self, x: jax.Array) -> jax.Array:
        size = self.config.pooling_kernel_size
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0)))
        return rearrange(x, "B (T size) D -> B T size D", size=size).mean(2)

    @jax.named_scope("quantize")
    def quantize(self, pooled: jax.Array) -> jax.Array:
        """The nearest code of each vector [B, T, D]: int32 [B, T], the first one of equals."""
        return self._nearest(self._compared(pooled))

    def vectors(self, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-mel frames [B, T, M] of one segment -> (the vectors that are compared with the codebook
        [B, T', code_dim], their codes int32 [B, T']); for training."""
        vectors = self._compared(self.pooled(frames))
        return vectors, self._nearest(jax.lax.stop_gradient(vectors))

    def _compared(self, pooled: jax.Array) -> jax.Array:
        if self.config.code_dim != self.config.d_model:
            pooled = self.project(pooled)
        return unit(pooled) if self.config.normalize_codes else pooled

    def _nearest(self, vectors: jax.Array) -> jax.Array:
        return nearest_codes(vectors, self._codebook())

    def _codebook(self) -> jax.Array:
        """The codebook in the form in which vectors are compared with it, [V, code_dim]."""
        return unit(self.codebook) if self.config.normalize_codes else self.codebook

    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Codes [B, T] of one segment -> their vectors plus positions, [B, T, code_dim]: the reference's
        last_hidden_state."""
        vectors: jax.Array = self._codebook()[codes] + self.code_positions[None, : codes.shape[1]]
        return vectors

    def step(self, frames: jax.Array, valid: jax.Array, state: EncoderState) -> tuple[jax.Array, EncoderState]:
        """The next frames of a stream.

        Args:
            frames: float32 [B, T, M]. T is a multiple of frames_per_code, divides the frames of a segment and is the
                same in every call, so that a call never crosses the end of a segment.
            valid: int32 [B], how many of the frames exist; less than T only in the last call of a stream.
            state: the result of the previous call, or `init_state`. A stream whose segment is full starts a new one.

        Returns:
            (codes int32 [B, T / frames_per_code], of which the first ceil(valid / frames_per_code) exist; the state)
        """
        config = self.config
        new_segment = state.position >= config.max_source_positions
        position = jnp.where(new_segment, 0, state.position)
        tail1 = jnp.where(new_segment[:, None, None], 0.0, state.conv1)
        tail2 = jnp.where(new_segment[:, None, None], 0.0, state.conv2)
        y = jax.nn.gelu(self.conv1(frames, tail1), approximate=False)
        x = jax.nn.gelu(self.conv2(y, tail2), approximate=False)
        x = x + self.positions[position[:, None] + jnp.arange(x.shape[1])[None]]
        past = Past(state.k, state.v, position)
        x, new = self.layers(x, jnp.arange(config.num_layers), past)
        assert new is not None  # there is a cache
        k, v = new
        exists = (jnp.arange(x.shape[1])[None] < -(-valid[:, None] // 2))[..., None]
        codes = self.quantize(self._pool(jnp.where(exists, x, 0.0)))
        new_state = EncoderState(
            conv1=tail_after(frames, tail1, frames.shape[1]),
            conv2=tail_after(y, tail2, y.shape[1]),
            k=_write(state.k, k, position),
            v=_write(state.v, v, position),
            position=position + x.shape[1],
        )
        return codes, new_state


def _write(cache: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """The cache [L, B, N, S, H] with new [L, B, N, T, H] at position [B]."""

    def write(row: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, part, start, axis=2)

    return jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)(cache, new, position)


def encoder_shapes(config: SpeechTokenizerConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat {path: shape} of the encoder's parameters."""
    return param_shapes(Encoder(config), jnp.zeros((1, config.frames_per_code, config.num_mel_bins)))


def init_params(config: SpeechTokenizerConfig, key: jax.Array) -> dict[str, Any]:
    """Random nested parameters of an encoder."""
    frames = jnp.zeros((1, config.frames_per_code, config.num_mel_bins))
    params: dict[str, Any] = nn.unbox(Encoder(config).init(key, frames))["params"]
    return params

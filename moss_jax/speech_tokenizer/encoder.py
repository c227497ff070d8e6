"""The causal Whisper-VQ encoder: log-mel frames at 100 Hz -> codes at 12.5 Hz (codec specification, section 3).

Dimension letters: B batch, T log-mel frames or encoder frames, S cached encoder frames, M mel bins, D width, N heads,
H head dimension, F feed-forward width, L layers.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from moss_jax.nn.conv import CausalConv1d
from moss_jax.nn.layers import LayerNorm, Linear, named
from moss_jax.nn.tree import param_shapes
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig

HEIGHT = 0.2  # of new positions
QUERY_BLOCK = 256  # queries that attend together in one pass; halves the work of causal attention over a segment


@flax.struct.dataclass
class EncoderState:
    """All that a stream remembers: the last inputs of the two convolutions, keys and values, and its place.

    Attributes:
        conv1: float32 [B, 2, M]. conv2: float32 [B, 2, D].
        key, value: float32 [L, B, N, S, H], S = max_source_positions; a head lies together, which is faster.
        position: int32 [B], encoder frames done in the current segment.
    """

    conv1: jax.Array
    conv2: jax.Array
    key: jax.Array
    value: jax.Array
    position: jax.Array


def init_state(config: SpeechTokenizerConfig, batch: int) -> EncoderState:
    """The state of `batch` streams that have not begun."""
    heads = (config.encoder_attention_heads, config.max_source_positions, config.head_dim)
    return EncoderState(
        conv1=jnp.zeros((batch, 2, config.num_mel_bins)),
        conv2=jnp.zeros((batch, 2, config.d_model)),
        key=jnp.zeros((config.num_layers, batch, *heads)),
        value=jnp.zeros((config.num_layers, batch, *heads)),
        position=jnp.zeros((batch,), jnp.int32),
    )


def sinusoids(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """Initialises positions in the form of Whisper's encoder, [length, width]: sines beside cosines of wavelengths from
    2 pi to 20,000 pi frames. Attention finds neighbours with them from the first step. They are a fifth as high as
    Whisper's, about as high as what new convolutions give: a small encoder begins to hear sooner."""
    return HEIGHT * _waves(*shape).astype(dtype)


def _waves(length: int, width: int) -> jax.Array:
    rates = jnp.exp(-jnp.log(10000.0) / (width // 2 - 1) * jnp.arange(width // 2))
    angles = jnp.arange(length)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def _unit_sinusoids(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    return (2 / shape[1]) ** 0.5 * _waves(*shape).astype(dtype)


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward. Shaped for `nn.scan`: (x, past) -> (x, new keys and values)."""

    config: SpeechTokenizerConfig

    @nn.compact
    def __call__(self, x: jax.Array, past: tuple[jax.Array, jax.Array] | None, seen: jax.Array | None):
        """x [B, T, D]; past (keys, values) [B, N, S, H], of which `seen` [B, S] may be attended to."""
        config = self.config
        heads = (config.encoder_attention_heads, config.head_dim)
        axes = ("embed", "heads", "head_dim")
        y = LayerNorm(config.layer_norm_epsilon, name="attention_norm")(x)
        query = Linear(heads, axes, name="q")(y)
        key = Linear(heads, axes, use_bias=False, name="k")(y)
        value = Linear(heads, axes, name="v")(y)
        if past is None:
            attended = causal_attention(query, key, value)
        else:
            query, key, value = (z.swapaxes(1, 2) for z in (query, key, value))  # [B, N, T, H]
            attended = cached_attention(query, key, value, past, seen).swapaxes(1, 2)
        x = x + Linear(config.d_model, ("heads", "head_dim", "embed"), in_dims=2, name="o")(attended)
        y = LayerNorm(config.layer_norm_epsilon, name="mlp_norm")(x)
        y = jax.nn.gelu(Linear(config.encoder_ffn_dim, ("embed", "mlp"), name="up")(y), approximate=False)
        x = x + Linear(config.d_model, ("mlp", "embed"), name="down")(y)
        return x, None if past is None else (key, value)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention in which a row sees the rows up to itself: three [B, T, N, H] -> [B, T, N, H]."""
    heads = [x.swapaxes(1, 2) for x in (query, key, value)]  # [B, N, T, H]
    # On a CPU the scores of one head stay in its cache (2.5 times as fast); elsewhere all heads go at once.
    y = jax.lax.platform_dependent(*heads, cpu=_heads_one_by_one, default=jax.vmap(jax.vmap(_attend_head)))
    return y.swapaxes(1, 2)


def _heads_one_by_one(*heads: jax.Array) -> jax.Array:
    rows = [x.reshape(-1, *x.shape[2:]) for x in heads]
    return jax.lax.map(lambda row: _attend_head(*row), rows).reshape(heads[0].shape)


def _attend_head(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The causal attention of one head, [T, H] each, block after block of queries."""
    frames = query.shape[0]
    blocks = []
    query = query * query.shape[-1] ** -0.5
    for start in range(0, frames, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, frames)
        score = query[start:end] @ key[:end].T
        visible = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        blocks.append(jax.nn.softmax(jnp.where(visible, score, -jnp.inf)) @ value[:end])
    return jnp.concatenate(blocks)


def cached_attention(query, key, value, past: tuple[jax.Array, jax.Array], seen: jax.Array) -> jax.Array:
    """The same for new rows [B, N, T, H] after the rows of `past` [B, N, S, H] that are `seen`, bool [B, S]."""
    query = query * query.shape[-1] ** -0.5
    older = jnp.einsum("bnth,bnsh->bnts", query, past[0])
    score = jnp.einsum("bnth,bnsh->bnts", query, key)
    visible = jnp.tril(jnp.ones(score.shape[-2:], bool))
    score = [jnp.where(seen[:, None, None], older, -jnp.inf), jnp.where(visible, score, -jnp.inf)]
    weights = jax.nn.softmax(jnp.concatenate(score, -1))
    older, newer = jnp.split(weights, [past[0].shape[2]], -1)
    return jnp.einsum("bnts,bnsh->bnth", older, past[1]) + jnp.einsum("bnts,bnsh->bnth", newer, value)


class Encoder(nn.Module):
    """Convolutions, scanned layers, average pooling, nearest code."""

    config: SpeechTokenizerConfig

    def setup(self):
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
        self.positions = self.param("positions", named(sinusoids, None, "embed"), (positions, config.d_model))
        # Beside codes of length 1 positions get the same length.
        beside = _unit_sinusoids if config.normalize_codes else sinusoids
        self.code_positions = self.param(
            "code_positions", named(beside, None, "code"), (config.codes_per_segment, config.code_dim)
        )
        self.codebook = self.param(
            "codebook", named(nn.initializers.normal(1.0), "vocab", "code"), (codes, config.code_dim)
        )

    def __call__(self, frames: jax.Array) -> jax.Array:
        """Log-mel frames [B, T, M] of one segment -> codes int32 [B, ceil(T / frames_per_code)]."""
        return self.quantize(self.pooled(frames))

    def pooled(self, frames: jax.Array) -> jax.Array:
        """Log-mel frames [B, T, M] of one segment -> the vectors to be quantised, [B, T', D]."""
        if frames.shape[1] % 2:
            frames = jnp.pad(frames, ((0, 0), (0, 1), (0, 0)))
        with jax.named_scope("convolutions"):
            x = jax.nn.gelu(self.conv1(frames), approximate=False)
            x = jax.nn.gelu(self.conv2(x), approximate=False)
        x = x + self.positions[: x.shape[1]]
        with jax.named_scope("layers"):
            x, _ = self.layers(x, None, None)
        return self._pool(x)

    def _pool(self, x: jax.Array) -> jax.Array:
        size = self.config.pooling_kernel_size
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0)))
        return x.reshape(x.shape[0], -1, size, x.shape[2]).mean(2)

    @jax.named_scope("quantize")
    def quantize(self, pooled: jax.Array) -> jax.Array:
        """The nearest code of each vector [B, T, D]: int32 [B, T], the first one of equals."""
        return self._nearest(self._compared(pooled))

    def vectors(self, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-mel frames [B, T, M] of one segment -> what is compared with the codebook, [B, T', code_dim], and the
        codes that come of it, int32 [B, T']; for training."""
        vectors = self._compared(self.pooled(frames))
        return vectors, self._nearest(jax.lax.stop_gradient(vectors))

    def _compared(self, pooled: jax.Array) -> jax.Array:
        if self.config.code_dim != self.config.d_model:
            pooled = self.project(pooled)
        return _unit(pooled) if self.config.normalize_codes else pooled

    def _nearest(self, vectors: jax.Array) -> jax.Array:
        codebook = _unit(self.codebook) if self.config.normalize_codes else self.codebook
        half_norms = jnp.square(codebook).sum(-1) / 2

        def nearest(rows):  # [T, C]; |row|^2 is the same for all codes and so left out
            product = jnp.matmul(rows, codebook.T, precision=jax.lax.Precision.HIGHEST)
            return jnp.argmin(half_norms - product, -1).astype(jnp.int32)

        return jax.lax.map(nearest, vectors)  # one clip at a time: all distances of a batch would take gigabytes

    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Vectors of the codes [B, T] of one segment with their positions added, [B, T, code_dim] (the reference's
        last_hidden_state)."""
        codebook = _unit(self.codebook) if self.config.normalize_codes else self.codebook
        return codebook[codes] + self.code_positions[: codes.shape[1]]

    def step(self, frames: jax.Array, valid: jax.Array, state: EncoderState) -> tuple[jax.Array, EncoderState]:
        """The next frames of a stream.

        Args:
            frames: float32 [B, T, M], T a multiple of frames_per_code that divides the frames of a segment, and the
                same in every call, so that a call never crosses the end of a segment.
            valid: int32 [B], how many frames there are; less than T only in the last call of a stream.
            state: where the stream is; it starts a new segment by itself when one is full.

        Returns:
            (codes int32 [B, T / frames_per_code], of which the first ceil(valid / frames_per_code) count; the state)
        """
        config = self.config
        again = state.position >= config.max_source_positions
        position = jnp.where(again, 0, state.position)
        tails = [jnp.where(again[:, None, None], 0.0, tail) for tail in (state.conv1, state.conv2)]
        x, conv1 = self.conv1(frames, tails[0])
        x, conv2 = self.conv2(jax.nn.gelu(x, approximate=False), tails[1])
        x = jax.nn.gelu(x, approximate=False)
        x = x + self.positions[position[:, None] + jnp.arange(x.shape[1])]
        seen = jnp.arange(config.max_source_positions) < position[:, None]
        x, (key, value) = self.layers(x, (state.key, state.value), seen)
        last = (jnp.arange(x.shape[1]) < -(-valid[:, None] // 2))[..., None]
        codes = self.quantize(self._pool(jnp.where(last, x, 0.0)))
        state = EncoderState(
            conv1, conv2, _write(state.key, key, position), _write(state.value, value, position), position + x.shape[1]
        )
        return codes, state


def _write(cache: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """Puts new [L, B, N, T, H] into cache [L, B, N, S, H] at position [B]."""

    def write(row, part, start):
        return jax.lax.dynamic_update_slice_in_dim(row, part, start, axis=2)

    return jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)(cache, new, position)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def encoder_shapes(config: SpeechTokenizerConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat {path: shape} of the encoder's parameters."""
    return param_shapes(Encoder(config), jnp.zeros((1, config.frames_per_code, config.num_mel_bins)))


def init_params(config: SpeechTokenizerConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters of an encoder, as a nested dictionary."""
    frames = jnp.zeros((1, config.frames_per_code, config.num_mel_bins))
    return nn.unbox(Encoder(config).init(key, frames))["params"]

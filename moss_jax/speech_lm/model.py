"""The layer-split transformer: Qwen3 layers, shared up to a depth, then a text branch and an audio branch.

A row of the grid is a text id and an audio id; one of them is embedded. Every row passes the shared block and both
branches, whatever its modality; each branch ends in a norm and a head of its own.

    text, audio ids -> embed -> shared -+-> text  -> norm -> head -> text logits
                                        +-> audio -> norm -> head -> audio logits

Dimension letters: B batch, T rows of this call, S columns of the cache, D embed, N query heads, K key/value heads,
H head size, F mlp, V vocabulary, L layers of a block. Source: arXiv 2510.00499 and the Qwen3 technical report.
"""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_jax.nn.attention import attention, cached_attention, fastest, splash_kernel
from moss_jax.nn.layers import Linear, named
from moss_jax.nn.rope import apply_rope, rope_angles
from moss_jax.nn.tree import param_axes, param_shapes
from moss_jax.sharding import constrain, num_shards, per_device
from moss_jax.speech_lm.cache import KVCache
from moss_jax.speech_lm.config import SpeechLMConfig

ACTIVATION = ("batch", "length", None)
POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis, in float32; rounded to x's dtype, then scaled."""

    config: SpeechLMConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.param_dtype)
        scale = self.param("scale", named(nn.initializers.ones, "norm"), x.shape[-1:], dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with a norm on each query and key head before RoPE; no biases."""

    config: SpeechLMConfig

    @nn.compact
    def __call__(self, x, angles, segment_ids, past, masks):
        cfg = self.config
        linear = functools.partial(_linear, cfg)
        kv_axes = ("embed", "kv_heads", "head_dim")
        q = linear((cfg.num_attention_heads, cfg.head_dim), ("embed", "heads", "head_dim"), name="q")(x)
        k = linear((cfg.num_key_value_heads, cfg.head_dim), kv_axes, name="k")(x)
        v = linear((cfg.num_key_value_heads, cfg.head_dim), kv_axes, name="v")(x)
        q = apply_rope(RMSNorm(cfg, name="q_norm")(q), *angles)
        k = apply_rope(RMSNorm(cfg, name="k_norm")(k), *angles)
        if past is None:
            y = _self_attention(cfg.attention, q, k, v, segment_ids)
            new = None
        else:
            new = KVCache(k.astype(past.k.dtype), v.astype(past.v.dtype))
            y = cached_attention(q, new.k, new.v, past.k, past.v, *masks).astype(x.dtype)
        return linear(cfg.hidden_size, ("heads", "head_dim", "embed"), in_dims=2, name="o")(y), new


def _self_attention(implementation: str, q, k, v, segment_ids):
    """Attention without a cache, on a mesh by device: its rows of the batch, its heads, its queries of the sequence.

    Where the sequence is divided, keys and values are gathered along it (their gradients are summed and divided again)
    and each device computes the rows of its own queries.
    """
    length = q.shape[1]
    heads = q.shape[2]
    kv_heads = k.shape[2]
    parts = num_shards("length", q.shape[1])
    head_parts = num_shards("kv_heads", kv_heads)
    if implementation == "auto":
        implementation = fastest(jax.default_backend(), q, parts)
    kernel = splash_kernel(length, heads, head_parts, parts) if implementation == "splash" and parts > 1 else None
    rows = jnp.arange(length) if parts > 1 else None

    def local(q, k, v, segments, key_segments, rows, kernel):
        return attention(q, k, v, segments, implementation, key_segment_ids=key_segments, rows=rows, kernel=kernel)

    queries = ("batch", "length", "heads", "head_dim")
    keys = ("batch", "all length", "kv_heads", "head_dim")
    axes = queries, keys, keys, ("batch", "length"), ("batch", "all length"), ("length",), ("heads", "length")
    return per_device(local, axes, queries)(q, k, v, segment_ids, segment_ids, rows, kernel)


@jax.custom_vjp
def _swiglu(gate, up):
    return nn.silu(gate) * up


def _swiglu_gradient(saved, gradient):
    # From the two inputs alone, and both as a whole: each is read by two products, and XLA's CPU backend would make it
    # again for each.
    gate, up, gradient = (x.astype(jnp.float32) for x in (*saved, gradient))
    share = nn.sigmoid(gate)
    gradients = gradient * up * share * (1 + gate * (1 - share)), gradient * gate * share
    return jax.lax.optimization_barrier(tuple(x.astype(saved[0].dtype) for x in gradients))


_swiglu.defvjp(lambda gate, up: (_swiglu(gate, up), (gate, up)), _swiglu_gradient)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: SpeechLMConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        gate = _linear(cfg, cfg.intermediate_size, ("embed", "mlp"), name="gate")(x)
        up = _linear(cfg, cfg.intermediate_size, ("embed", "mlp"), name="up")(x)
        return _linear(cfg, cfg.hidden_size, ("mlp", "embed"), name="down")(_swiglu(gate, up))


class Layer(nn.Module):
    """One pre-norm Qwen3 layer: x [B, T, D] -> x [B, T, D] and, with a cache, this layer's new keys and values.

    `past` is this layer's part of the cache, [B, S, K, H] twice, or None; `masks` are those of `cached_attention`.
    """

    config: SpeechLMConfig

    @nn.compact
    def __call__(self, x, angles, segment_ids, past, masks):
        y = RMSNorm(self.config, name="attention_norm")(x)
        y, new = Attention(self.config, name="attention")(y, angles, segment_ids, past, masks)
        x = x + y
        x = x + MLP(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x))
        return constrain(x, *ACTIVATION), new


@jax.custom_vjp
def _lookup(table, ids):
    return table[ids]


def _lookup_gradient(saved, gradient):
    # A frequent id is added up thousands of times: in float32, whatever the table is computed in.
    table, ids = saved
    total = jnp.zeros(table.shape, jnp.float32).at[ids].add(gradient.astype(jnp.float32))
    return total.astype(table.dtype), None


_lookup.defvjp(lambda table, ids: (table[ids], (table, ids)), _lookup_gradient)


class Embed(nn.Module):
    """int ids [B, T] -> their vectors [B, T, D]."""

    config: SpeechLMConfig
    vocab_size: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        init = named(nn.initializers.normal(0.02), "vocab", "embed")
        dtype = jnp.dtype(self.config.param_dtype)
        table = self.param("embedding", init, (self.vocab_size, self.config.hidden_size), dtype)
        # Whole in D, like any other parameter at its use: else each device would look up a part of every row of the
        # batch, and the whole batch would have to travel.
        return _lookup(constrain(table, "vocab", None), ids)


class Head(nn.Module):
    """x [B, T, D] -> float32 logits [B, T, V]; the product itself runs in x's dtype."""

    config: SpeechLMConfig
    vocab_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = named(nn.initializers.normal(0.02), "embed", "vocab")
        dtype = jnp.dtype(self.config.param_dtype)
        kernel = self.param("kernel", init, (x.shape[-1], self.vocab_size), dtype)
        y = jnp.einsum("BTD,DV->BTV", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return constrain(y, "batch", "length", "vocab")


class Block(nn.Module):
    """A stack of layers, scanned; with a vocabulary also an embedding table, a final norm and a head."""

    config: SpeechLMConfig
    num_layers: int
    vocab_size: int = 0
    unroll: bool = False  # the layers one after the other in the program: faster on a CPU, longer to compile

    def setup(self):
        cfg = self.config
        layer = Layer
        if cfg.remat != "none":
            layer = nn.remat(layer, policy=POLICIES[cfg.remat], prevent_cse=False)
        if self.num_layers:
            self.layers = nn.scan(
                layer,
                variable_axes={"params": 0, "lora": 0},  # lora: adapters beside kernels, where there are any
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
                length=self.num_layers,
                unroll=self.num_layers if self.unroll else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(cfg)
        if self.vocab_size:
            self.embed = Embed(cfg, self.vocab_size)
            self.norm = RMSNorm(cfg)
            self.head = Head(cfg, self.vocab_size)

    def __call__(self, x, positions, segment_ids=None):
        cfg = self.config
        if not self.num_layers:  # a branch without a split: its norm and head alone
            return x
        return self.layers(x, rope_angles(positions, cfg.head_dim, cfg.rope_theta), segment_ids, None, None)[0]

    def cached(self, x, positions, cache: KVCache, index, valid):
        cfg = self.config
        if not self.num_layers:
            return x, cache
        length = x.shape[1]
        columns = jnp.arange(valid.shape[1])
        new_valid = jax.lax.dynamic_slice_in_dim(valid, index, length, 1)  # [B, T]
        masks = valid & (columns < index), jnp.tril(jnp.ones((length, length), bool)) & new_valid[:, None]
        x, new = self.layers(x, rope_angles(positions, cfg.head_dim, cfg.rope_theta), None, cache, masks)
        return x, cache.write(new.k, new.v, index)

    def logits(self, y):
        return self.head(self.norm(y))


class LayerSplitModel(nn.Module):
    """The language model. Parameters lie under `shared/`, `text/`, `audio/`, the layers of each stacked on axis 0."""

    config: SpeechLMConfig

    def setup(self):
        cfg = self.config
        if cfg.num_shared_layers:
            self.shared = Block(cfg, cfg.num_shared_layers)
        self.text = Block(cfg, cfg.num_modality_layers, cfg.text_vocab_size)
        if cfg.audio_vocab_size:
            self.audio = Block(cfg, cfg.num_modality_layers, cfg.audio_vocab_size)

    def embed(self, grid: jax.Array) -> jax.Array:
        """int grid [B, T, 2] (text id, audio id) -> [B, T, D]. The audio id counts where text is modality_pad only."""
        text = grid[..., 0]
        audio = grid[..., 1]
        x = self.text.embed(text)
        if self.config.audio_vocab_size:
            x = jnp.where((text == self.config.modality_pad_id)[..., None], self.audio.embed(audio), x)
        return constrain(x.astype(self.config.dtype), *ACTIVATION)

    def block(self, name: str, x, positions, segment_ids=None, *, cache: KVCache | None = None, index=None, valid=None):
        """Runs the block "shared", "text" or "audio".

        Without a cache (training, scoring): a row sees the rows before it in its own segment. With one (prefill in
        chunks of any length, decoding): the call's keys and values go to columns index .. index+T-1 and a row in
        column i sees column j if j <= i and valid[b, j]; columns from `index` on are overwritten or ignored.

        Args:
            x: [B, T, D].
            positions: int [B, T], for RoPE; they go on through all blocks.
            segment_ids: int [B, T] or None, without a cache only; left padding is segment 0.
            cache: of this block, S columns, index + T <= S.
            index: int scalar, the first column to write.
            valid: bool [B, S], True where a column holds a row that may be seen, this call's rows included.

        Returns:
            y [B, T, D] without a cache; (y, KVCache) with one.
        """
        block = getattr(self, name)
        if cache is None:
            return block(x, positions, segment_ids)
        return block.cached(x, positions, cache, index, valid)

    def logits(self, branch: str, y: jax.Array) -> jax.Array:
        """Final norm and head of the branch "text" or "audio": y [B, T, D] -> float32 [B, T, V]."""
        return getattr(self, branch).logits(y)

    def __call__(self, grid, positions, segment_ids=None) -> tuple[jax.Array, jax.Array | None]:
        """grid int [B, T, 2] -> text and audio logits, float32 [B, T, V]; the latter None without an audio branch."""
        h = self.embed(grid)
        if self.config.num_shared_layers:
            h = self.block("shared", h, positions, segment_ids)
        text = self.logits("text", self.block("text", h, positions, segment_ids))
        if not self.config.audio_vocab_size:
            return text, None
        return text, self.logits("audio", self.block("audio", h, positions, segment_ids))


def model_shapes(config: SpeechLMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat {path: ShapeDtypeStruct} of the parameters."""
    return dict(_shapes(_plain(config)))


def model_axes(config: SpeechLMConfig) -> dict[str, tuple[str | None, ...]]:
    """Flat {path: logical axis names} of the parameters, for `moss_jax.sharding.shardings_for`."""
    return dict(_axes(_plain(config)))


def _plain(config: SpeechLMConfig) -> SpeechLMConfig:
    return replace(config, attention="xla", remat="none")  # the kernels refuse the single row of _INPUTS


@functools.cache
def _shapes(config: SpeechLMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return param_shapes(LayerSplitModel(config), *_INPUTS)


@functools.cache
def _axes(config: SpeechLMConfig) -> dict[str, tuple[str | None, ...]]:
    return param_axes(LayerSplitModel(config), *_INPUTS)


_INPUTS = jax.ShapeDtypeStruct((1, 1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.int32)


def _linear(config: SpeechLMConfig, out_shape, axes, *, in_dims: int = 1, name: str) -> Linear:
    dtypes = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
    return Linear(out_shape, axes, in_dims, False, *dtypes, name=name)

"""The Qwen3 transformer: configuration, RMSNorm, attention, SwiGLU, scanned stacks of layers, and the KV cache.

Every model here with a Qwen3 backbone is built from these modules; embeddings, heads and the number of stacks are the
model's own. Source: the Qwen3 technical report, arXiv 2505.09388.

Dimension letters: B batch, T rows of this call, S columns of the cache, D embed, N query heads, K key/value heads,
H head size, F mlp, V vocabulary, L layers of a stack.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moss_jax.errors import MossError
from moss_jax.nn.attention import attention, cached_attention, fastest, splash_kernel
from moss_jax.nn.layers import Linear, named, over_last_axes
from moss_jax.nn.rope import apply_rope, rope_angles
from moss_jax.sharding import constrain, num_shards, per_device

ATTENTION = ("auto", "xla", "cudnn", "splash")
REMAT = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}
INITIALIZER_RANGE = 0.02  # standard deviation of new tables and heads: `initializer_range` of Qwen3's config.json
ACTIVATION_AXES = ("batch", "length", None)
CACHE_AXES = ("layers", "batch", None, "kv_heads", "head_dim")


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Sizes of one Qwen3 layer, and how to compute it. The number of layers belongs to each `Stack`."""

    hidden_size: int  # D, width of the residual stream
    intermediate_size: int  # F, width of the SwiGLU feed-forward
    num_attention_heads: int  # N, query heads
    num_key_value_heads: int  # K, key and value heads; each serves N / K query heads
    head_dim: int  # H, even
    rope_theta: float = 1e6  # base of the rotary frequencies
    rms_norm_eps: float = 1e-6  # added to the mean square
    attention: str = "auto"  # one of ATTENTION: implementation of attention without a cache; "auto": by backend
    remat: str = "none"  # one of REMAT: what the backward pass recomputes (nothing; all but products; everything)
    dtype: str = "float32"  # of activations, one of DTYPES
    param_dtype: str = "float32"  # of parameters, one of DTYPES

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        for name in sizes:
            value = getattr(self, name)
            self._require(type(value) is int, f"{name} is {value!r}, expected a whole number")
            self._require(value >= 1, f"{name} is {value}, expected at least 1")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            valid = isinstance(value, int | float) and 0 < value < math.inf
            self._require(valid, f"{name} is {value!r}, expected a number above 0")
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads
        self._require(heads % kv_heads == 0, f"{heads} attention heads do not divide into {kv_heads} key/value heads")
        self._require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}, expected an even number")
        choices = {"attention": ATTENTION, "remat": REMAT, "dtype": DTYPES, "param_dtype": DTYPES}
        for name, known in choices.items():
            value = getattr(self, name)
            self._require(value in known, f"{name} is {value!r}, expected one of {', '.join(known)}")

    @staticmethod
    def _require(condition: bool, problem: str) -> None:
        if not condition:
            raise MossError(f"transformer config: {problem}")


@struct.dataclass
class KVCache:
    """Keys (after norm and RoPE) and values of a stack: k, v [L, B, S, K, H], S columns of capacity.

    Inside a layer, the cache of that layer alone: k, v [B, S, K, H].
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def zeros(
        cls, config: Qwen3Config, num_layers: int, batch: int, capacity: int, dtype: str | None = None
    ) -> "KVCache":
        """An empty cache; dtype None is the config's."""
        shape = (num_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        zeros = partial(jnp.zeros, shape, jnp.dtype(dtype or config.dtype))
        return cls(k=constrain(zeros(), *CACHE_AXES), v=constrain(zeros(), *CACHE_AXES))

    def write(self, k: jax.Array, v: jax.Array, index: jax.Array) -> "KVCache":
        """The cache with k, v [L, B, T, K, H] in columns index .. index+T-1; index + T must not exceed S."""
        start = (0, 0, index, 0, 0)
        return KVCache(
            k=constrain(jax.lax.dynamic_update_slice(self.k, k, start), *CACHE_AXES),
            v=constrain(jax.lax.dynamic_update_slice(self.v, v, start), *CACHE_AXES),
        )


class LayerInputs(NamedTuple):
    """What all layers of a stack share: RoPE angles, and either segment ids or the masks of the cache."""

    cos: jax.Array  # float32 [B, T, H/2]
    sin: jax.Array  # float32 [B, T, H/2]
    segment_ids: jax.Array | None = None  # int [B, T]; without a cache only
    past_mask: jax.Array | None = None  # bool [B, S], cached columns that may be attended to
    mask: jax.Array | None = None  # bool [B, T, T], rows of this call that each row may attend to


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis, in float32; rounded to x's dtype, then scaled."""

    epsilon: float
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.param_dtype)
        scale: jax.Array = self.param("scale", named(nn.initializers.ones, "norm"), x.shape[-1:], dtype)
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype) * over_last_axes(scale.astype(x.dtype), x)


class Attention(nn.Module):
    """Grouped-query attention with a norm on each query and key head before RoPE; no biases.

    x [B, T, D] -> y [B, T, D] and, with a cache, the new keys and values [B, T, K, H].
    """

    config: Qwen3Config

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: LayerInputs, past: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        cfg = self.config
        heads = (cfg.num_attention_heads, cfg.head_dim)
        kv_heads = (cfg.num_key_value_heads, cfg.head_dim)
        kv_axes = ("embed", "kv_heads", "head_dim")
        q = _linear(cfg, heads, ("embed", "heads", "head_dim"), name="q")(x)
        k = _linear(cfg, kv_heads, kv_axes, name="k")(x)
        v = _linear(cfg, kv_heads, kv_axes, name="v")(x)
        q = apply_rope(_norm(cfg, "q_norm")(q), shared.cos, shared.sin)
        k = apply_rope(_norm(cfg, "k_norm")(k), shared.cos, shared.sin)
        new = None
        if past is None:
            y = _self_attention(cfg.attention, q, k, v, shared.segment_ids)
        else:
            assert shared.past_mask is not None and shared.mask is not None, "a cache needs its masks"
            new = KVCache(k=k.astype(past.k.dtype), v=v.astype(past.v.dtype))
            y = cached_attention(q, new.k, new.v, past.k, past.v, shared.past_mask, shared.mask).astype(x.dtype)
        y = _linear(cfg, cfg.hidden_size, ("heads", "head_dim", "embed"), in_dims=2, name="o")(y)
        return y, new


def _self_attention(
    implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Attention without a cache. On a mesh each device has its part of the batch, heads and query rows.

    Where the sequence is sharded, keys and values are gathered along it (their gradients are summed and sharded again)
    and each device computes the rows of its own queries.
    """
    length = q.shape[1]
    heads = q.shape[2]
    kv_heads = k.shape[2]
    shards = num_shards("length", length)
    head_shards = num_shards("kv_heads", kv_heads)
    if implementation == "auto":
        implementation = fastest(jax.default_backend(), q, shards)
    kernel = None
    rows = None
    if shards > 1:
        rows = jnp.arange(length)
        if implementation == "splash":
            kernel = splash_kernel(length, heads, head_shards, shards)

    def local(q, k, v, segments, key_segments, rows, kernel):  # type: ignore[no-untyped-def]  # mirrors the axes below
        return attention(q, k, v, segments, implementation, key_segment_ids=key_segments, rows=rows, kernel=kernel)

    query_axes = ("batch", "length", "heads", "head_dim")
    key_axes = ("batch", "all length", "kv_heads", "head_dim")
    axes = (
        query_axes,
        key_axes,
        key_axes,
        ("batch", "length"),  # segments of the queries
        ("batch", "all length"),  # segments of the keys
        ("length",),  # rows
        ("heads", "length"),  # kernel
    )
    return per_device(local, axes, query_axes)(q, k, v, segment_ids, segment_ids, rows, kernel)


@jax.custom_vjp
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return nn.silu(gate) * up


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _swiglu(gate, up), (gate, up)


def _swiglu_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    # From the two inputs alone, and both as a whole: each is read by two products, and XLA's CPU backend would
    # recompute it for each.
    dtype = saved[0].dtype
    gate, up = (x.astype(jnp.float32) for x in saved)
    gradient = gradient.astype(jnp.float32)
    sigmoid = nn.sigmoid(gate)
    gate_gradient = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    up_gradient = gradient * gate * sigmoid
    gradients = (gate_gradient.astype(dtype), up_gradient.astype(dtype))
    gate_gradient, up_gradient = jax.lax.optimization_barrier(gradients)
    return gate_gradient, up_gradient


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), x [B, T, D] -> [B, T, D]."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        gate = _linear(cfg, cfg.intermediate_size, ("embed", "mlp"), name="gate")(x)
        up = _linear(cfg, cfg.intermediate_size, ("embed", "mlp"), name="up")(x)
        return _linear(cfg, cfg.hidden_size, ("mlp", "embed"), name="down")(_swiglu(gate, up))


class Layer(nn.Module):
    """One pre-norm layer: x [B, T, D] -> x [B, T, D] and, with a cache, this layer's new keys and values.

    The output is also sown as "output" into the collection "intermediates", which costs nothing unless `apply` is
    called with `mutable="intermediates"`.
    """

    config: Qwen3Config

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: LayerInputs, past: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        cfg = self.config
        y, new = Attention(cfg, name="attention")(_norm(cfg, "attention_norm")(x), shared, past)
        x = x + y
        x = x + MLP(cfg, name="mlp")(_norm(cfg, "mlp_norm")(x))
        x = constrain(x, *ACTIVATION_AXES)
        self.sow("intermediates", "output", x)
        return x, new


class Stack(nn.Module):
    """Layers with one program for all of them: parameters [L, ...] under `layers`, scanned over L.

    Collections: "params"; "lora", optional low-rank adapters of kernels; "intermediates", see `Layer`.
    A stack without layers returns its input.
    """

    config: Qwen3Config
    num_layers: int
    unroll: bool = False  # no loop in the compiled program: faster on a CPU, but compile time grows with depth

    def setup(self) -> None:
        layer = Layer
        if self.config.remat != "none":
            # prevent_cse guards against XLA merging recomputed with saved values, which cannot happen inside a scan.
            layer = nn.remat(layer, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        if self.num_layers:
            self.layers = nn.scan(
                layer,
                variable_axes={"params": 0, "lora": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=self.num_layers,
                unroll=self.num_layers if self.unroll else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(self.config)

    def __call__(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Whole sequences, without a cache: x [B, T, D], int positions and segment ids [B, T] -> [B, T, D].

        A row attends to itself and to the rows before it in its own segment.
        """
        if not self.num_layers:
            return x
        y, _ = self.layers(x, LayerInputs(*self._angles(positions), segment_ids), None)
        return y

    def cached(
        self, x: jax.Array, positions: jax.Array, cache: KVCache, index: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """New rows after those in the cache: x [B, T, D] -> ([B, T, D], cache with their keys and values).

        Args:
            positions: int [B, T], for RoPE.
            cache: S columns, index + T <= S.
            index: int scalar, the first column to write.
            valid: bool [B, S], True where a column holds a row that may be attended to, this call's rows included.
        """
        if not self.num_layers:
            return x, cache
        length = x.shape[1]
        past_mask = valid & (jnp.arange(valid.shape[1]) < index)[None]
        new_valid = jax.lax.dynamic_slice_in_dim(valid, index, length, 1)  # [B, T]
        mask = jnp.tril(jnp.ones((length, length), bool))[None] & new_valid[:, None]
        shared = LayerInputs(*self._angles(positions), None, past_mask, mask)
        x, new = self.layers(x, shared, cache)  # new keys and values of all layers
        assert new is not None
        return x, cache.write(new.k, new.v, index)

    def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope_angles(positions, self.config.head_dim, self.config.rope_theta)


@jax.custom_vjp
def _lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids]


def _lookup_forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table[ids], (table, ids)


def _lookup_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    # The gradients of a frequent id are summed thousands of times: in float32, whatever the dtype of the table.
    table, ids = saved
    total = jnp.zeros(table.shape, jnp.float32).at[ids].add(gradient.astype(jnp.float32))
    return total.astype(table.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


class Embed(nn.Module):
    """int ids [B, T] -> their vectors [B, T, D]."""

    config: Qwen3Config
    vocab_size: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        init = named(nn.initializers.normal(INITIALIZER_RANGE), "vocab", "embed")
        shape = (self.vocab_size, self.config.hidden_size)
        table = self.param("embedding", init, shape, jnp.dtype(self.config.param_dtype))
        # Whole in D, like any other parameter where it is used: otherwise each device would look up a part of every
        # row of the batch, and the whole batch would have to be communicated.
        return _lookup(constrain(table, "vocab", None), ids)


class Head(nn.Module):
    """x [B, T, D] -> float32 logits [B, T, V]; the product runs in x's dtype."""

    config: Qwen3Config
    vocab_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = named(nn.initializers.normal(INITIALIZER_RANGE), "embed", "vocab")
        shape = (x.shape[-1], self.vocab_size)
        kernel = self.param("kernel", init, shape, jnp.dtype(self.config.param_dtype))
        y = jnp.einsum("BTD,DV->BTV", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return constrain(y, "batch", "length", "vocab")


def _norm(config: Qwen3Config, name: str) -> RMSNorm:
    return RMSNorm(config.rms_norm_eps, config.param_dtype, name=name)


def _linear(
    config: Qwen3Config, out_shape: int | tuple[int, ...], axes: tuple[str, ...], *, in_dims: int = 1, name: str
) -> Linear:
    return Linear(
        out_shape,
        axes,
        in_dims=in_dims,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        name=name,
    )

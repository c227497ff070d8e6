"""Layers with logical axis names on every parameter. Channels are last everywhere: `[batch, time, channels]`."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


def named(init, *axes: str | None):
    """An initialiser whose parameter carries logical axis names; `sharding.py` says what they mean on a mesh."""
    return nn.with_logical_partitioning(init, axes)


def product(x: jax.Array, kernel: jax.Array, in_dims: int = 1, dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., *in] and a kernel [*in, *out] of the same dtype -> [..., *out] of `dtype`, None: the same.

    Its kernel gradient is one product in the kernel's own layout. Left to itself JAX makes the transposed one, and
    XLA's CPU backend then computes what lies before it, an activation's derivative say, in transposed order.
    """
    return _product(x, kernel, in_dims, dtype)


def _dot(x, kernel, in_dims, dtype):
    contract = tuple(range(x.ndim - in_dims, x.ndim)), tuple(range(in_dims))
    return jax.lax.dot_general(x, kernel, (contract, ((), ())), preferred_element_type=dtype)


def _product_forward(x, kernel, in_dims, dtype):
    return _dot(x, kernel, in_dims, dtype), (x, kernel)  # as an operation that a policy of jax.checkpoint can see


def _product_backward(in_dims, _, saved, y):
    x, kernel = saved
    out = tuple(range(in_dims, kernel.ndim))
    lead = tuple(range(x.ndim - in_dims))
    contract = tuple(range(y.ndim - len(out), y.ndim)), out
    dx = jax.lax.dot_general(y, kernel, (contract, ((), ())), preferred_element_type=x.dtype)
    return dx, jax.lax.dot_general(x, y, ((lead, lead), ((), ())), preferred_element_type=kernel.dtype)


_product = jax.custom_vjp(_dot, nondiff_argnums=(2, 3))
_product.defvjp(_product_forward, _product_backward)


class Linear(nn.Module):
    """`x @ kernel + bias`, contracting the last `in_dims` axes of x: [..., *in] -> [..., *out_shape].

    `axes` names the axes of the kernel, inputs first. Parameters: kernel [*in, *out_shape], bias [*out_shape].
    The result has dtype `dtype`, or that of x and the kernel promoted when None. A low-rank adapter is added where the
    collection "lora" has one: a [*in, rank], b [rank, *out_shape].
    """

    out_shape: int | Sequence[int]
    axes: Sequence[str | None]
    in_dims: int = 1
    use_bias: bool = True
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = (self.out_shape,) if isinstance(self.out_shape, int) else tuple(self.out_shape)
        in_axes = tuple(range(self.in_dims))
        out_axes = tuple(range(self.in_dims, self.in_dims + len(out)))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axes, out_axes)
        kernel = self.param("kernel", named(init, *self.axes), (*x.shape[-self.in_dims :], *out), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", named(nn.initializers.zeros, *self.axes[self.in_dims :]), out, self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = product(x, kernel, self.in_dims)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name).astype(x.dtype) for name in "ab")
            y = y + jnp.tensordot(jnp.tensordot(x, a, self.in_dims), b, 1)
        return y if bias is None else y + bias


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis in float32. Parameters: scale [C], bias [C]."""

    epsilon: float = 1e-5
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", named(nn.initializers.ones, self.axis), x.shape[-1:], jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, self.axis), x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32)
        centred = y - y.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (y * scale + bias).astype(x.dtype)


class Embed(nn.Module):
    """A table of vectors: int ids [...] -> [..., features]. Parameter: embedding [size, features]."""

    size: int
    features: int
    axes: tuple[str | None, str | None] = ("vocab", "embed")
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        init = named(nn.initializers.normal(0.02), *self.axes)
        table = self.param("embedding", init, (self.size, self.features), self.param_dtype)
        return table[ids]

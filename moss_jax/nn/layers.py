"""Layers with logical axis names on every parameter. Channels are last everywhere: `[batch, time, channels]`."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., Any]  # (key, shape, dtype) -> a parameter


def named(init: Initializer, *axes: str | None) -> Initializer:
    """An initialiser whose parameter carries logical axis names; `moss_jax.sharding` maps them to axes of a mesh."""
    return nn.with_logical_partitioning(init, axes)


def over_last_axes(value: jax.Array, x: jax.Array) -> jax.Array:
    """`value` [*S] with leading axes of size 1, so that it broadcasts over the last axes of x [..., *S]."""
    return jax.lax.expand_dims(value, range(x.ndim - value.ndim))


def product(x: jax.Array, kernel: jax.Array, in_dims: int = 1, dtype: Any = None) -> jax.Array:
    """x [..., *in] times a kernel [*in, *out] of the same dtype -> [..., *out].

    The gradient of the kernel is one product in the kernel's own layout. JAX would compute the transposed one, and
    XLA's CPU backend would then compute the operations before it, such as an activation's derivative, in transposed
    order.

    Args:
        in_dims: the number of axes that are contracted.
        dtype: of the result; None: that of x.
    """
    y: jax.Array = _product(x, kernel, in_dims, dtype)
    return y


def _dot(x: jax.Array, kernel: jax.Array, in_dims: int, dtype: Any) -> jax.Array:
    contract = tuple(range(x.ndim - in_dims, x.ndim)), tuple(range(in_dims))
    return jax.lax.dot_general(x, kernel, (contract, ((), ())), preferred_element_type=dtype)


def _product_forward(
    x: jax.Array, kernel: jax.Array, in_dims: int, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dot(x, kernel, in_dims, dtype), (x, kernel)  # as an operation that a policy of jax.checkpoint can see


def _product_backward(
    in_dims: int, _: Any, saved: tuple[jax.Array, jax.Array], y: jax.Array
) -> tuple[jax.Array, jax.Array]:
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

    Parameters: kernel [*in, *out_shape], bias [*out_shape]. A low-rank adapter is added where the collection "lora"
    has one: a [*in, rank], b [rank, *out_shape].

    Attributes:
        axes: logical names of the kernel's axes, inputs first.
        dtype: of the result; None: that of x and the kernel promoted.
    """

    out_shape: int | Sequence[int]
    axes: Sequence[str | None]
    in_dims: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

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
            a: jax.Array = self.get_variable("lora", "a").astype(x.dtype)
            b: jax.Array = self.get_variable("lora", "b").astype(x.dtype)
            y = y + jnp.tensordot(jnp.tensordot(x, a, self.in_dims), b, 1)
        return y if bias is None else y + over_last_axes(bias, y)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis in float32. Parameters: scale [C], bias [C]."""

    epsilon: float = 1e-5
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", named(nn.initializers.ones, self.axis), x.shape[-1:], jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, self.axis), x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32)
        centered = y - y.mean(-1, keepdims=True)
        y = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + self.epsilon)
        normalized: jax.Array = (y * over_last_axes(scale, y) + over_last_axes(bias, y)).astype(x.dtype)
        return normalized


class Embed(nn.Module):
    """A table of vectors: ids int [...] -> [..., features]. Parameter: embedding [size, features]."""

    size: int
    features: int
    axes: tuple[str | None, str | None] = ("vocab", "embed")
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        init = named(nn.initializers.normal(0.02), *self.axes)
        table: jax.Array = self.param("embedding", init, (self.size, self.features), self.param_dtype)
        return table[ids]

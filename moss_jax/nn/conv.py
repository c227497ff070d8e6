"""One-dimensional convolution over time, and its causal form, which keeps a tail between calls."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_jax.nn.layers import named, over_last_axes


def conv1d(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> jax.Array:
    """Cross-correlation as in torch: x [B, T, in], kernel [W, in, out], bias [out] -> [B, T', out].

    `padding`: zeros on the left and on the right.
    """
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride,), [padding], rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
    )
    return y if bias is None else y + over_last_axes(bias, y)


class Conv1d(nn.Module):
    """`conv1d` with its parameters: kernel [W, in, out], bias [out]."""

    features: int
    width: int
    stride: int = 1
    dilation: int = 1
    padding: tuple[int, int] = (0, 0)
    axes: tuple[str | None, str | None] = ("conv_in", "conv_out")
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = _parameters(self, x.shape[-1])
        return conv1d(x, kernel, bias, stride=self.stride, dilation=self.dilation, padding=self.padding)


class CausalConv1d(nn.Module):
    """A convolution whose output at a step depends on no later input. Parameters: kernel [W, in, out], bias [out]."""

    features: int
    width: int
    stride: int = 1
    axes: tuple[str | None, str | None] = ("conv_in", "conv_out")
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, tail: jax.Array | None = None) -> jax.Array:
        """x [B, T, in] -> [B, T / stride, out].

        Args:
            tail: [B, W - 1, in], the inputs before x in a stream: zeros for its first call, then `tail_after`. The
                lengths of all calls must be multiples of the stride. None: zeros.
        """
        kernel, bias = _parameters(self, x.shape[-1])
        if tail is None:
            return conv1d(x, kernel, bias, stride=self.stride, padding=(self.width - 1, 0))
        return conv1d(jnp.concatenate([tail.astype(x.dtype), x], 1), kernel, bias, stride=self.stride)


def tail_after(x: jax.Array, tail: jax.Array, length: jax.Array | int) -> jax.Array:
    """The tail [B, W - 1, C] of a causal convolution after the first `length` rows of x, given the tail before x."""
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate([tail, x], 1), length, tail.shape[1], 1)


def _parameters(conv: Conv1d | CausalConv1d, channels: int) -> tuple[jax.Array, jax.Array | None]:
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", (0, 1), 2)
    kernel = conv.param("kernel", named(init, None, *conv.axes), (conv.width, channels, conv.features), jnp.float32)
    if not conv.use_bias:
        return kernel, None
    return kernel, conv.param("bias", named(nn.initializers.zeros, conv.axes[1]), (conv.features,), jnp.float32)

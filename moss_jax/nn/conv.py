"""One-dimensional convolution over time, and its causal form that carries a tail from call to call."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_jax.nn.layers import named


def conv1d(x, kernel, bias=None, *, stride: int = 1, dilation: int = 1, padding: tuple[int, int] = (0, 0)) -> jax.Array:
    """Cross-correlation, as in torch: x [B, T, I], kernel [K, I, O], bias [O] -> [B, T', O]."""
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride,), [padding], rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
    )
    return y if bias is None else y + bias


class Conv1d(nn.Module):
    """`conv1d` with its parameters: kernel [K, I, O], bias [O]. `padding` is (left, right) zeros."""

    features: int
    width: int
    stride: int = 1
    dilation: int = 1
    padding: tuple[int, int] = (0, 0)
    axes: tuple[str | None, str | None] = ("conv_in", "conv_out")
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = _conv_params(self, x.shape[-1])
        return conv1d(x, kernel, bias, stride=self.stride, dilation=self.dilation, padding=self.padding)


class CausalConv1d(nn.Module):
    """A convolution whose output at a step sees no later input.

    `__call__(x)` pads `width - 1` zeros on the left. `__call__(x, tail)` puts the last `width - 1` inputs of the call
    before there instead and returns `(y, tail)`; the lengths of all calls must be multiples of the stride. A stream
    starts with a tail of zeros [B, width - 1, I].
    """

    features: int
    width: int
    stride: int = 1
    axes: tuple[str | None, str | None] = ("conv_in", "conv_out")
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, tail: jax.Array | None = None):
        kernel, bias = _conv_params(self, x.shape[-1])
        if tail is None:
            return conv1d(x, kernel, bias, stride=self.stride, padding=(self.width - 1, 0))
        x = jnp.concatenate([tail.astype(x.dtype), x], 1)
        return conv1d(x, kernel, bias, stride=self.stride), x[:, x.shape[1] - (self.width - 1) :]


def _conv_params(conv: nn.Module, channels: int):
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", (0, 1), 2)
    kernel = conv.param("kernel", named(init, None, *conv.axes), (conv.width, channels, conv.features), jnp.float32)
    bias = None
    if conv.use_bias:
        bias = conv.param("bias", named(nn.initializers.zeros, conv.axes[1]), (conv.features,), jnp.float32)
    return kernel, bias

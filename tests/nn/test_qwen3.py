"""The Qwen3 modules on their own, without the language model: a stack of any size, its cache, and its layer outputs."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.errors import MossError
from moss_jax.nn.qwen3 import KVCache, Qwen3Config, RMSNorm, Stack

CONFIG = Qwen3Config(
    hidden_size=24, intermediate_size=40, num_attention_heads=6, num_key_value_heads=3, head_dim=4, rope_theta=1e4
)
STACK = Stack(CONFIG, num_layers=3)
LENGTH = 7
POSITIONS = jnp.arange(LENGTH)[None].repeat(2, 0)


@pytest.fixture(scope="module")
def inputs():
    return jax.random.normal(jax.random.key(1), (2, LENGTH, CONFIG.hidden_size))


@pytest.fixture(scope="module")
def variables(inputs):
    return nn.unbox(jax.jit(STACK.init)(jax.random.key(0), inputs, POSITIONS))


def test_a_stack_through_its_cache_equals_one_pass(inputs, variables):
    expected = STACK.apply(variables, inputs, POSITIONS)
    cache = KVCache.zeros(CONFIG, 3, batch=2, capacity=9)
    assert cache.k.shape == (3, 2, 9, 3, 4) and cache.v.dtype == jnp.float32
    valid = jnp.ones((2, 9), bool)
    outputs = []
    for start, stop in ((0, 4), (4, 5), (5, LENGTH)):
        rows = slice(start, stop)
        y, cache = STACK.apply(
            variables, inputs[:, rows], POSITIONS[:, rows], cache, jnp.int32(start), valid, method="cached"
        )
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, 1), expected, atol=1e-5)
    assert (np.asarray(cache.k[:, :, LENGTH:]) == 0).all()


def test_layer_outputs_are_collected_on_request_only(inputs, variables):
    y = STACK.apply(variables, inputs, POSITIONS)
    collected, state = STACK.apply(variables, inputs, POSITIONS, mutable="intermediates")
    (layers,) = state["intermediates"]["layers"]["output"]
    assert layers.shape == (3, 2, LENGTH, CONFIG.hidden_size)
    np.testing.assert_array_equal(collected, y)
    np.testing.assert_array_equal(layers[-1], y)
    assert not np.allclose(layers[0], layers[1])


def test_a_stack_without_layers_returns_its_input(inputs):
    empty = Stack(CONFIG, num_layers=0)
    cache = KVCache.zeros(CONFIG, 0, batch=2, capacity=LENGTH)
    assert empty.apply({}, inputs, POSITIONS) is inputs
    y, same = empty.apply({}, inputs, POSITIONS, cache, jnp.int32(0), jnp.ones((2, LENGTH), bool), method="cached")
    assert y is inputs and same is cache


def test_rms_norm_needs_no_model_config():
    x = jnp.array([[3.0, 4.0]], jnp.bfloat16)
    norm = RMSNorm(epsilon=0.5, param_dtype="bfloat16")
    variables = nn.unbox(norm.init(jax.random.key(0), x))
    assert variables["params"]["scale"].dtype == jnp.bfloat16
    y = norm.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), np.array([[3.0, 4.0]]) / np.sqrt(13.0), rtol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 0}, "head_dim is 0, expected at least 1"),
        ({"hidden_size": 24.0}, "hidden_size is 24.0, expected a whole number"),
        ({"num_key_value_heads": 4}, "6 attention heads do not divide into 4 key/value heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number above 0"),
        ({"remat": "some"}, "remat is 'some', expected one of none, dots, full"),
    ],
)
def test_a_wrong_config_is_an_error(change, message):
    with pytest.raises(MossError, match=message):
        replace(CONFIG, **change)

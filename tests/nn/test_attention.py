"""Every attention against the plain one, and the plain one against its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.nn.attention import attention, cached_attention, fastest, splash
from moss_jax.nn.rope import apply_rope, rope_angles


def heads(seed, batch, length, heads, size, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal((batch, length, heads, size), np.float32)
    return jnp.asarray(x.astype(dtype))


def definition(q, k, v, mask):
    """Attention as in the textbook, float64, keys and values repeated; mask [B, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (x.repeat(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = np.where(mask[:, None], np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def test_plain_attention_is_the_definition():
    q = heads(0, 2, 9, 4, 8)
    k = heads(1, 2, 9, 2, 8)
    v = heads(2, 2, 9, 2, 8)
    segments = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 0, 0]])
    mask = np.tril(np.ones((9, 9), bool)) & (segments[:, :, None] == segments[:, None])
    np.testing.assert_allclose(
        jax.jit(attention, static_argnums=4)(q, k, v, segments, "xla"), definition(q, k, v, mask), atol=1e-5
    )


@pytest.mark.parametrize("length", [64, 150, 600])  # one block, a short last one, blocks of more than the smallest
def test_attention_in_blocks_is_the_definition_and_has_its_gradients(length):
    q = heads(0, 2, length, 4, 8)
    k = heads(1, 2, length, 2, 8)
    v = heads(2, 2, length, 2, 8)
    cuts = np.array([[length // 3], [length // 2 + 7]])
    segments = (np.arange(length) >= cuts).astype(np.int32)
    mask = np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None])

    def both(function):
        def loss(*x):
            y = function(*x)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    (_, y), ours = both(lambda *x: attention(*x, segments, "xla"))(q, k, v)
    _, plain = both(lambda *x: jax.nn.dot_product_attention(*x, mask=mask[:, None], implementation="xla"))(q, k, v)
    np.testing.assert_allclose(y, definition(q, k, v, mask), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, plain)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), new=st.sampled_from([1, 4]), filled=st.integers(0, 12))
def test_cached_attention_is_the_definition(seed, new, filled):
    rng = np.random.default_rng(seed)
    q = heads(seed, 2, new, 4, 8)
    k = heads(seed + 1, 2, new, 2, 8)
    v = heads(seed + 2, 2, new, 2, 8)
    past_k = heads(seed + 3, 2, 12, 2, 8)
    past_v = heads(seed + 4, 2, 12, 2, 8)
    past_mask = (rng.random((2, 12)) < 0.7) & (np.arange(12) < filled)
    mask = np.broadcast_to(np.tril(np.ones((new, new), bool)), (2, new, new))
    ours = jax.jit(cached_attention)(q, k, v, past_k, past_v, past_mask, mask)
    whole = np.concatenate([np.broadcast_to(past_mask[:, None], (2, new, 12)), mask], 2)
    expected = definition(q, np.concatenate([past_k, k], 1), np.concatenate([past_v, v], 1), whole)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_query_that_sees_nothing_gives_numbers():
    q = heads(0, 1, 1, 2, 8)
    k = heads(1, 1, 1, 2, 8)
    v = heads(2, 1, 1, 2, 8)
    y = cached_attention(q, k, v, k, v, np.zeros((1, 1), bool), np.zeros((1, 1, 1), bool))
    assert np.isfinite(y).all()


@pytest.mark.parametrize("packed", [False, True])
def test_splash_equals_plain_attention(packed):
    q = heads(0, 2, 256, 4, 128)
    k = heads(1, 2, 256, 2, 128)
    v = heads(2, 2, 256, 2, 128)
    segments = np.repeat([[0, 1, 2], [1, 1, 2]], [20, 100, 136], axis=1) if packed else None
    run = jax.jit(lambda *x: splash(*x, segments, interpret=True))
    np.testing.assert_allclose(run(q, k, v), attention(q, k, v, segments, "xla"), atol=1e-5)


@pytest.mark.slow
def test_splash_has_the_gradients_of_plain_attention():
    q = heads(0, 1, 128, 2, 128)
    k = heads(1, 1, 128, 1, 128)
    v = heads(2, 1, 128, 1, 128)
    segments = np.repeat([[1, 2]], [50, 78], axis=1)
    ours = jax.grad(lambda *x: jnp.sin(splash(*x, segments, interpret=True)).sum(), (0, 1, 2))(q, k, v)
    plain = jax.grad(lambda *x: jnp.sin(attention(*x, segments, "xla")).sum(), (0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, plain)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_equals_plain_attention(packed):
    q, k, v = (heads(i, 2, 192, n, 128, jnp.bfloat16) for i, n in enumerate((8, 2, 2)))
    segments = np.repeat([[0, 1, 2], [1, 1, 2]], [20, 100, 72], axis=1) if packed else None
    plain = attention(*(x.astype(jnp.float32) for x in (q, k, v)), segments, "xla")
    np.testing.assert_allclose(attention(q, k, v, segments, "cudnn").astype(jnp.float32), plain, atol=3e-2)


def test_the_backend_and_the_shapes_pick_the_implementation():
    def pick(backend, length, size, dtype):
        return fastest(backend, jax.ShapeDtypeStruct((1, length, 8, size), dtype))

    assert pick("tpu", 1024, 128, jnp.bfloat16) == "splash"
    assert pick("tpu", 1000, 128, jnp.bfloat16) == pick("tpu", 1024, 64, jnp.bfloat16) == "xla"
    assert pick("gpu", 1000, 128, jnp.bfloat16) == pick("gpu", 8, 64, jnp.float16) == "cudnn"
    assert pick("gpu", 999, 128, jnp.bfloat16) == pick("gpu", 1000, 256, jnp.bfloat16) == "xla"
    assert pick("gpu", 1000, 128, jnp.float32) == pick("cpu", 1024, 128, jnp.bfloat16) == "xla"


def test_rope_depends_on_distance_alone_and_keeps_bfloat16_positions_apart():
    q = heads(0, 1, 1, 1, 16)
    k = heads(1, 1, 1, 1, 16)

    def score(i, j, dtype=jnp.float32):
        turned = [apply_rope(x.astype(dtype), *rope_angles(jnp.array([[p]]), 16, 1e6)) for x, p in ((q, i), (k, j))]
        return float((turned[0].astype(jnp.float32) * turned[1].astype(jnp.float32)).sum())

    np.testing.assert_allclose(score(9000, 8990), score(20, 10), atol=2e-3)
    assert abs(score(20, 10) - score(21, 10)) > 1e-2
    assert abs(score(9000, 8990, jnp.bfloat16) - score(20, 10)) < 0.1

"""Every attention compared with the plain one, and the plain one with its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.nn.attention import (
    Past,
    attention,
    cached_attention,
    causal_attention,
    chunk_mask,
    fastest,
    masked_attention,
    splash,
)
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


@pytest.mark.parametrize("length", [9, 300])  # one block, and two
def test_causal_attention_is_plain_attention(length):
    q, k, v = (heads(seed, 2, length, 3, 8) for seed in range(3))
    expected = attention(q, k, v, None, "xla")
    np.testing.assert_allclose(jax.jit(causal_attention)(q, k, v), expected, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), filled=st.tuples(st.integers(0, 150), st.integers(0, 150)), ring=st.integers(0, 7))
def test_masked_attention_with_caches_is_the_definition(seed, filled, ring):
    """A cache that is filled differently in each row of the batch, and a ring of 7 slots that both share."""
    rng = np.random.default_rng(seed)
    q, k, v = (heads(seed + i, 2, 5, 3, 8) for i in range(3))
    stacked = rng.normal(size=(2, 2, 2, 3, 150, 8)).astype(np.float32)  # keys and values, layers, B, N, S, H
    shared = rng.normal(size=(2, 2, 3, 7, 8)).astype(np.float32)
    mask = np.asarray(chunk_mask(5, jnp.ones((2, 5), bool), 2))
    filled = np.array(filled, np.int32)
    past = (
        Past(jnp.asarray(stacked[0]), jnp.asarray(stacked[1]), jnp.asarray(filled), (jnp.int32(1),)),
        Past(jnp.asarray(shared[0]), jnp.asarray(shared[1]), jnp.int32(ring)),
    )
    ours = jax.jit(masked_attention)(q, k, v, mask, past)
    cached = [x.transpose(0, 2, 1, 3) for x in (stacked[0, 1], stacked[1, 1], *shared)]
    visible = np.arange(150) < filled[:, None]
    columns = [np.broadcast_to(visible[:, None], (2, 5, 150)), np.broadcast_to(np.arange(7) < ring, (2, 5, 7)), mask]
    expected = definition(
        q,
        np.concatenate([cached[0], cached[2], k], 1),
        np.concatenate([cached[1], cached[3], v], 1),
        np.concatenate(columns, 2),
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_masked_attention_attends_to_a_memory_of_another_length():
    q = heads(0, 2, 4, 3, 8)
    k = heads(1, 2, 6, 3, 8)
    v = heads(2, 2, 6, 3, 8)
    valid = np.arange(6) < np.array([[6], [4]])
    expected = definition(q, k, v, np.broadcast_to(valid[:, None], (2, 4, 6)))
    np.testing.assert_allclose(masked_attention(q, k, v, valid[:, None]), expected, atol=1e-5)


def test_a_fully_masked_query_gives_finite_numbers():
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


def test_backend_and_shapes_select_the_implementation():
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

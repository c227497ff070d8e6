"""Compares two sequences of vectors: cosines, the best match of each position, and the best monotone path."""

from typing import Any

import jax
import jax.numpy as jnp


def cosines(s: jax.Array, t: jax.Array) -> jax.Array:
    """Cosines of all pairs: s [..., S, D], t [..., T, D] -> float32 [..., S, T]."""
    s = _normalized(s)
    t = _normalized(t)
    return jnp.einsum("...SD,...TD->...ST", s, t, preferred_element_type=jnp.float32)


def best_match(c: jax.Array, speech: jax.Array, text: jax.Array) -> jax.Array:
    """Mean over text positions of the cosine with the best speech position.

    Args:
        c: float32 [S, T], cosines.
        speech, text: how many rows and columns of c are not padding.

    Returns:
        float32 scalar.
    """
    rows = jnp.arange(c.shape[0]) < speech
    columns = jnp.arange(c.shape[1]) < text
    best = jnp.where(rows[:, None], c, -jnp.inf).max(0)
    return jnp.where(columns, best, 0).sum() / text


def best_path(c: jax.Array, speech: jax.Array, text: jax.Array) -> jax.Array:
    """Mean of c along the best monotone path, by dynamic time warping.

    A path leads from the first pair to the last one in steps of one position in speech, in text, or in both; the best
    one has the smallest sum of 1 - c.

    Args:
        c: float32 [S, T], cosines.
        speech, text: how many rows and columns of c are not padding.

    Returns:
        float32 scalar.
    """
    S, T = c.shape
    columns = jnp.arange(T)

    def advance(carry: Any, diagonal: jax.Array) -> Any:
        """One anti-diagonal: cells (diagonal - t, t). The carry is (cost, steps), each [T], of the two before it."""
        (one, one_steps), (two, two_steps) = carry
        row = diagonal - columns
        inside = (row >= 0) & (row < S)
        cost = jnp.where(inside, 1 - c[jnp.clip(row, 0, S - 1), columns], jnp.inf)
        before = jnp.stack([one, _shifted(one, jnp.inf), _shifted(two, jnp.inf)])  # from speech, text, both
        steps = jnp.stack([one_steps, _shifted(one_steps, 0), _shifted(two_steps, 0)])
        choice = before.argmin(0)
        start = diagonal == 0
        best = jnp.where(start, 0.0, before[choice, columns]) + cost
        count = jnp.where(start, 0, steps[choice, columns]) + 1
        new = (jnp.where(inside, best, jnp.inf), count)
        return (new, (one, one_steps)), new

    nothing = (jnp.full(T, jnp.inf), jnp.zeros(T, jnp.int32))
    _, (costs, counts) = jax.lax.scan(advance, (nothing, nothing), jnp.arange(S + T - 1))
    end = (speech + text - 2, text - 1)
    return 1 - costs[end] / counts[end]


def _normalized(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _shifted(x: jax.Array, fill: float) -> jax.Array:
    """x [T] moved by one position, with `fill` in the first."""
    return jnp.concatenate([jnp.full(1, fill, x.dtype), x[:-1]])

"""Attention over what a stream has cached and the rows of the present call, and the positions of its rows.

Everything here is pure: rows are mel frames or codes, R is the batch of rows that are computed together.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

QUERY_BLOCK = 1024  # the most query rows whose scores are held at once in a long call without a cache
KEY_BLOCK = 128  # cached key rows that are read at once
MASKED = -1e10  # the reference's score of a key that may not be seen; finite, so that no row becomes NaN


@struct.dataclass
class Past:
    """Cached keys and values that a call may read: `k`, `v` [..., R, N, S, H], of which the first `filled` of S count.

    `index` picks the leading axes (Euler step, layer). `turn` [S, D], where the attention has relative positions, is
    `sinusoids` of the absolute positions of the slots.
    """

    k: jax.Array
    v: jax.Array
    filled: jax.Array
    index: tuple[jax.Array, ...] = ()
    turn: jax.Array | None = None


def allowed(rows: int, valid: jax.Array, chunk: int | jax.Array | None) -> jax.Array:
    """Which keys each of `rows` queries may see, bool [B, T, S]: the valid ones (bool [B, S]), of which under a static
    chunk mask only those of the query's own chunk and before. Row 0 stands at the beginning of a chunk. Items may have
    chunks of their own, int32 [B]; one as long as the rows is no mask."""
    if chunk is None:
        return jnp.broadcast_to(valid[:, None, :], (valid.shape[0], rows, valid.shape[1]))
    if jnp.ndim(chunk):
        own = jnp.arange(rows) // chunk[:, None]
        return valid[:, None, :] & (own[:, None, :] <= own[:, :, None])
    own = jnp.arange(rows) // chunk
    return valid[:, None, :] & (own[None, :] <= own[:, None])[None]


def attend(q, k, v, mask, past: Sequence[Past] = (), turned=None, turn=None) -> jax.Array:
    """Softmax attention of q [B, T, N, H] over `past` and the call's own k, v [B, T, N, H]; mask bool [B, T, T].

    All cached keys are visible to all queries; `mask` is about the call's own. The cache is only read. Scores are
    scaled by 1/sqrt(H). With relative positions, `turned` [B, T, N, D] are the queries' coefficients for the
    sinusoids `turn` [T, D] of the own keys (and `Past.turn` of the cached ones); see `relative`.
    """
    scale = q.shape[-1] ** -0.5
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * scale, k, v))  # [B, N, T, H]
    if turned is not None:
        turned = turned.transpose(0, 2, 1, 3) * scale
    if not past and q.shape[2] > QUERY_BLOCK:
        return _in_query_blocks(q, k, v, mask, turned, turn).transpose(0, 2, 1, 3)
    scores = jnp.where(mask[:, None], _scores(q, k, turned, turn), MASKED)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    state = (top, weights.sum(-1, keepdims=True), weights @ v)
    for part in past:
        state = _over_blocks(q, turned, part, state)
    return (state[2] / state[1]).transpose(0, 2, 1, 3).astype(v.dtype)


def _scores(q, k, turned, turn) -> jax.Array:
    scores = jnp.einsum("bnth,bnsh->bnts", q, k)
    return scores if turned is None else scores + jnp.einsum("bntd,sd->bnts", turned, turn)


def _in_query_blocks(q, k, v, mask, turned, turn) -> jax.Array:
    """Exact attention without holding all scores: the memory grows with the keys, not with queries times keys."""
    rows = q.shape[2]
    blocks = -(-rows // QUERY_BLOCK)
    size = -(-rows // blocks)

    def split(x, axis):
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, blocks * size - rows)
        shape = (*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, pads).reshape(shape), axis, 0)

    def block(parts):
        q, mask, *turned = parts
        scores = jnp.where(mask[:, None], _scores(q, k, *(turned or [None]), turn), MASKED)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        return (weights @ v) / weights.sum(-1, keepdims=True)

    parts = (split(q, 2), split(mask, 1)) + (() if turned is None else (split(turned, 2),))
    out = jnp.moveaxis(jax.lax.map(block, parts), 0, 2)  # [B, N, blocks, size, H]
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :rows]


def _over_blocks(q, turned, past: Past, state):
    """Adds the filled part of a cache to a running softmax (maximum, sum, weighted values), a block of keys at a time,
    so that the cost follows what is filled and each key is read from memory once."""
    lead = past.k.ndim - 4
    size = min(KEY_BLOCK, past.k.shape[-2])
    slots = past.k.shape[-2]

    def body(i, state):
        top, total, values = state
        # The last block of a cache that is no multiple of the block moves back, and masks what was counted already.
        start = jnp.minimum(i * size, slots - size)
        at = (*past.index, 0, 0, start, 0)
        shape = (*(1,) * lead, *past.k.shape[lead:-2], size, past.k.shape[-1])
        k = jax.lax.dynamic_slice(past.k, at, shape).reshape(shape[lead:]).astype(q.dtype)
        v = jax.lax.dynamic_slice(past.v, at, shape).reshape(shape[lead:]).astype(q.dtype)
        turn = None if turned is None else jax.lax.dynamic_slice_in_dim(past.turn, start, size)
        slot = start + jnp.arange(size)
        scores = jnp.where((slot >= i * size) & (slot < past.filled), _scores(q, k, turned, turn), MASKED)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        shrink = jnp.exp(top - new_top)
        return new_top, total * shrink + weights.sum(-1, keepdims=True), values * shrink + weights @ v

    return jax.lax.fori_loop(0, (past.filled + size - 1) // size, body, state)


# Relative positions, as in Transformer-XL: score += (q_i + v) . p_{i-j} with p_r = W PE(r), PE(r) interleaving
# sin(r w_k) and cos(r w_k). By the addition theorems this is a product of a vector that depends on i alone and
# PE(j), so a key needs only its own absolute position, wherever it lies in a cache.


def sinusoids(positions: jax.Array, size: int) -> jax.Array:
    """PE of absolute positions, int [S] in 0..65535 -> float32 [S, size], exact to float32 rounding for all positions.

    sin(p w) in float32 is off by p * 6e-8, so p is split in high and low digits, whose tables come in float64."""
    base = 128
    most = 2**16
    rates = np.exp(-np.arange(0, size, 2) * np.log(10000.0) / size)
    low = np.arange(base)[:, None] * rates
    high = np.arange(0, most, base)[:, None] * rates
    ls, lc, hs, hc = (
        jnp.asarray(f(angle), jnp.float32)[digit]
        for angle, digit in ((low, positions % base), (high, positions // base))
        for f in (np.sin, np.cos)
    )
    return jnp.stack([hs * lc + hc * ls, hc * lc - hs * ls], -1).reshape(len(positions), size)


def relative(query: jax.Array, kernel: jax.Array, turn: jax.Array) -> jax.Array:
    """The coefficients c of each query with c_i . PE(j) = query_i . (W PE(i - j)).

    query [B, T, N, H]; kernel W [D, N, H]; turn [T, D] = sinusoids of the queries' positions -> [B, T, N, D].
    """
    rows = jnp.einsum("btnh,dnh->btnd", query, kernel)
    sine = turn[:, None, 0::2]
    cosine = turn[:, None, 1::2]
    a = rows[..., 0::2]
    b = rows[..., 1::2]
    return jnp.stack([b * sine - a * cosine, a * sine + b * cosine], -1).reshape(rows.shape)

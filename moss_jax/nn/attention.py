"""Causal attention: without a cache picked by backend, with a cache in two parts under one softmax.

Grouped queries: N query heads share K key/value heads, head n reads key/value head n // (N / K). Keys and values are
never repeated in memory. Scores are scaled by 1/sqrt(H); softmax is float32.
"""

import math

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query that sees nothing gives numbers, not NaN
SPLASH_BLOCK = 128  # splash wants lengths and head size in multiples of this
# without a kernel: blocks of a sequence, and queries that a block has at least
BLOCKS = 8
SMALLEST_BLOCK = 64


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids=None,
    implementation: str = "auto",
    *,
    key_segment_ids=None,
    rows=None,
    kernel=None,
) -> jax.Array:
    """Causal self-attention over whole sequences: q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H].

    Args:
        segment_ids: int [B, T]; a position sees only positions of its own segment. With left padding the padding is
            segment 0 and the rest 1. None: one segment.
        implementation: "xla" (the reference), "cudnn" (NVIDIA GPU, bfloat16 or float16), "splash" (TPU), or "auto":
            the fastest of them that this backend and these shapes allow.
        key_segment_ids: int [B, S] where the queries are a part of the sequence only; None: `segment_ids`.
        rows: int [T], which rows of the sequence the queries are; None: all, T = S.
        kernel: what `splash_kernel` made for the whole sequence, where "splash" gets a part of the queries.
    """
    if implementation == "auto":
        implementation = fastest(jax.default_backend(), q)
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    if implementation == "splash":
        return splash(q, k, v, segment_ids, key_segment_ids=key_segment_ids, kernel=kernel)
    return {"xla": _xla, "cudnn": _cudnn}[implementation](q, k, v, segment_ids, key_segment_ids, rows)


def fastest(backend: str, q: jax.Array, parts: int = 1) -> str:
    """The name of the implementation to use on `backend` ("cpu", "gpu", "tpu") for queries like q [B, T, N, H], of
    which each device has one of `parts`."""
    if backend == "tpu" and _divides(q, parts * SPLASH_BLOCK, SPLASH_BLOCK):
        return "splash"
    # cuDNN: half precision, small heads, and in the backward pass of packed rows an even length
    if backend == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and _divides(q, 2, 8) and q.shape[3] <= 128:
        return "cudnn"
    return "xla"


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past_k: jax.Array,
    past_v: jax.Array,
    past_mask: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Attention of new positions to a cache, which is only read, and to each other, in one softmax.

    Args:
        q: [B, T, N, H]; k, v: [B, T, K, H] of the new positions.
        past_k, past_v: [B, S, K, H].
        past_mask: bool [B, S], which cached columns may be seen.
        mask: bool [B, T, T], which new positions (last axis) each new position may see.
    """
    q = _grouped(q, k.shape[2])
    past = jnp.where(past_mask[:, None, None, None], _scores(q, past_k), MASKED)  # [B, K, G, T, S]
    new = jnp.where(mask[:, None, None], _scores(q, k), MASKED)  # [B, K, G, T, T]
    top = jnp.maximum(past.max(-1), new.max(-1))[..., None]
    past = jnp.exp(past - top)
    new = jnp.exp(new - top)
    total = past.sum(-1) + new.sum(-1)  # [B, K, G, T]
    y = _weighted(past, past_v) + _weighted(new, v)
    return _ungrouped(y / total.transpose(0, 3, 1, 2)[..., None], v.dtype)


def _divides(q, length: int, size: int) -> bool:
    return q.shape[1] % length == 0 and q.shape[3] % size == 0


def _xla(q, k, v, segment_ids, key_segment_ids, rows):
    """Heads first, block of queries after block of queries, each with the keys up to its own end only."""
    (B, T, N, H) = q.shape
    K = k.shape[2]
    q = (q.transpose(0, 2, 1, 3) / math.sqrt(H)).reshape(B, K, N // K, T, H).astype(k.dtype)
    k = k.transpose(0, 2, 1, 3)
    v = v.transpose(0, 2, 1, 3)
    if rows is not None:  # a part of the sequence: they may see any of it
        y = _block(q, k, v, _seen(rows, segment_ids, key_segment_ids, slice(None), k.shape[2]))
        return y.reshape(B, N, T, H).transpose(0, 2, 1, 3)
    size = max(SMALLEST_BLOCK, math.ceil(T / BLOCKS))
    starts = list(range(0, T, size))
    # Divided, not sliced: the gradient of a slice is as long as the whole.
    q, k, v = (jnp.split(x, starts[1:], axis) for x, axis in ((q, 3), (k, 2), (v, 2)))
    parts = []
    for i, start in enumerate(starts):
        end = min(start + size, T)
        seen = _seen(jnp.arange(start, end), segment_ids, key_segment_ids, slice(start, end), end)
        parts.append(_block(q[i], _joined(k[: i + 1], 2), _joined(v[: i + 1], 2), seen))
    return _joined(parts, 3).reshape(B, N, T, H).transpose(0, 2, 1, 3)


def _seen(rows, segment_ids, key_segment_ids, queries: slice, columns: int):
    """bool [1 or B, 1, rows, columns]: which of the first `columns` keys each of these queries sees."""
    seen = (rows[:, None] >= jnp.arange(columns))[None, None]
    if segment_ids is None:
        return seen
    return seen & _same_segment(segment_ids[:, queries], key_segment_ids[:, :columns])


def _joined(parts, axis: int):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _block(q, k, v, seen):
    """q [B, K, G, T, H], k and v [B, K, S, H], seen bool [B, 1, T, S] -> [B, K, G, T, H].

    Normalised last: two plain batched products around one pass over the scores, forward and back.
    """
    (B, K, G, T, H) = q.shape
    S = k.shape[2]
    q = q.reshape(B, K, G * T, H)
    scores = jnp.einsum("BKTH,BKSH->BKTS", q, k, preferred_element_type=jnp.float32).reshape(B, K, G, T, S)
    scores = scores + jnp.where(seen, 0.0, MASKED)[:, :, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))).reshape(B, K, G * T, S)
    y = jnp.einsum("BKTS,BKSH->BKTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (y / weights.sum(-1, keepdims=True)).astype(v.dtype).reshape(B, K, G, T, H)


def _same_segment(segment_ids, key_segment_ids):
    return (segment_ids[:, :, None] == key_segment_ids[:, None])[:, None]


def _grouped(q, kv_heads: int):
    B, T, N, H = q.shape
    return q.reshape(B, T, kv_heads, N // kv_heads, H)


def _scores(q, k):
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    return scores / math.sqrt(q.shape[-1])


def _weighted(weights, v):
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _ungrouped(y, dtype):
    B, T, K, G, H = y.shape
    return y.reshape(B, T, K * G, H).astype(dtype)


def _cudnn(q, k, v, segment_ids, key_segment_ids, rows):
    # Packed rows need a mask of the segments; cuDNN takes it as a bias and applies causality itself.
    mask = None if segment_ids is None else _same_segment(segment_ids, key_segment_ids)
    if rows is not None:
        seen = (rows[:, None] >= jnp.arange(k.shape[1]))[None, None]
        mask = seen if mask is None else mask & seen
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=rows is None, implementation="cudnn")


def splash(q, k, v, segment_ids=None, interpret: bool = False, *, key_segment_ids=None, kernel=None) -> jax.Array:
    """Splash attention, the blockwise kernel for TPU; `interpret` runs it on a CPU, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    B, T, N, H = q.shape
    if kernel is None:
        kernel = splash_kernel(T, N, interpret=interpret)
    if segment_ids is None:
        segment_ids = jnp.zeros((B, T), jnp.int32)
        key_segment_ids = jnp.zeros(k.shape[:2], jnp.int32)
    elif key_segment_ids is None:
        key_segment_ids = segment_ids
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q / math.sqrt(H), k, v))

    def one(q, k, v, segments, key_segments):
        return kernel(q, k, v, splash_attention.SegmentIds(segments, key_segments))

    y = jax.vmap(one)(*heads_first, segment_ids, key_segment_ids)
    return y.transpose(0, 2, 1, 3).astype(v.dtype)


def splash_kernel(length: int, heads: int, head_parts: int = 1, parts: int = 1, interpret: bool = False):
    """The splash kernel for `length` rows, of which each device has one of `parts` as queries and all as keys, and one
    of `head_parts` of the query heads."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length), shard_count=parts)] * heads)
    keys = math.gcd(length, 4 * SPLASH_BLOCK)
    queries = math.gcd(length // parts, 4 * SPLASH_BLOCK)
    blocks = {f"block_{name}": keys for name in ("kv", "kv_compute", "kv_dkv", "kv_dkv_compute", "kv_dq")}
    blocks |= {f"block_{name}": queries for name in ("q", "q_dkv", "q_dq")}
    return splash_attention.make_splash_mha(
        mask,
        head_shards=head_parts,
        q_seq_shards=parts,
        block_sizes=splash_attention.BlockSizes(**blocks),
        interpret=interpret,
    )

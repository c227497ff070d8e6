"""Attention: over whole sequences, over a cache, and in streams with several caches and relative positions.

- `attention`: causal, over whole sequences, packed or not; the fastest implementation of the backend.
- `causal_attention`: causal, over one whole segment in float32; fast for long segments on a CPU.
- `cached_attention`: new positions against a cache [B, S, K, H] of which any columns may be visible.
- `masked_attention`: any mask over the call's own rows, and caches [..., B, N, S, H] that are filled from the start,
  which may be rings; optionally with relative positions.

Grouped queries: N query heads share K key/value heads, head n reads key/value head n // (N / K). Keys and values are
never repeated in memory. Scores are scaled by 1/sqrt(H); softmax is float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

MASKED = -1e30  # finite, so that a query that sees nothing gives numbers, not NaN
SPLASH_BLOCK = 128  # splash needs lengths and head size in multiples of this
# Without a kernel a sequence is cut into BLOCKS blocks of queries, but none shorter than SMALLEST_BLOCK.
BLOCKS = 8
SMALLEST_BLOCK = 64
HEAD_BLOCK = 256  # queries of `causal_attention` that are computed together; halves the work over a segment
# Of `masked_attention`.
QUERY_BLOCK = 1024  # rows of a call without a cache whose scores are in memory at a time
KEY_BLOCK = 128  # cached keys that are read at a time
MASKED_SCORE = -1e10  # the released flow's score of a masked key; finite, so that a fully masked row gives no NaN


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
    *,
    key_segment_ids: jax.Array | None = None,
    rows: jax.Array | None = None,
    kernel: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Causal self-attention over whole sequences: q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H].

    Args:
        segment_ids: int [B, T]; a position sees only positions of its own segment. With left padding the padding is
            segment 0 and the rest 1. None: one segment.
        implementation: "xla" (the reference), "cudnn" (NVIDIA GPU, bfloat16 or float16), "splash" (TPU), or "auto":
            the fastest of them that this backend and these shapes allow.
        key_segment_ids: int [B, S], required where the queries are a part of the sequence; None: `segment_ids`.
        rows: int [T], which rows of the sequence the queries are; None: all, T = S.
        kernel: the result of `splash_kernel` for the whole sequence, where "splash" gets a part of the queries.
    """
    if implementation == "auto":
        implementation = fastest(jax.default_backend(), q)
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    if implementation == "splash":
        return splash(q, k, v, segment_ids, key_segment_ids=key_segment_ids, kernel=kernel)
    return {"xla": _xla, "cudnn": _cudnn}[implementation](q, k, v, segment_ids, key_segment_ids, rows)


def fastest(backend: str, q: jax.Array | jax.ShapeDtypeStruct, parts: int = 1) -> str:
    """The name of the fastest implementation on `backend` ("cpu", "gpu", "tpu") for queries like q [B, T, N, H].

    `parts`: the number of devices that the queries' T is divided among.
    """
    if backend == "tpu" and _divides(q, parts * SPLASH_BLOCK, SPLASH_BLOCK):
        return "splash"
    # cuDNN: half precision, small heads, and in the backward pass of packed rows an even length
    if backend == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and _divides(q, 2, 8) and q.shape[3] <= 128:
        return "cudnn"
    return "xla"


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of one segment in float32, for long sequences: three [B, T, N, H] -> [B, T, N, H].

    On a CPU it takes head after head, whose scores then stay in the processor's cache: 2.5 times as fast for segments
    of 1500 rows. Elsewhere all heads are computed at once.
    """
    heads = [rearrange(x, "B T N H -> B N T H") for x in (q, k, v)]
    y: jax.Array = jax.lax.platform_dependent(*heads, cpu=_head_by_head, default=jax.vmap(jax.vmap(_causal_head)))
    return rearrange(y, "B N T H -> B T N H")


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
        past_mask: bool [B, S], which cached columns are visible.
        mask: bool [B, T, T], which new positions (last axis) each new position sees.
    """
    q = rearrange(q, "B T (K G) H -> B T K G H", K=k.shape[2])
    past = jnp.where(past_mask[:, None, None, None], _grouped_scores(q, past_k), MASKED)  # [B, K, G, T, S]
    new = jnp.where(mask[:, None, None], _grouped_scores(q, k), MASKED)  # [B, K, G, T, T]
    top = jnp.maximum(past.max(-1), new.max(-1))[..., None]
    past = jnp.exp(past - top)
    new = jnp.exp(new - top)
    total = past.sum(-1) + new.sum(-1)  # [B, K, G, T]
    y = _grouped_values(past, past_v) + _grouped_values(new, v)
    y = y / rearrange(total, "B K G T -> B T K G 1")
    return rearrange(y, "B T K G H -> B T (K G) H").astype(v.dtype)


class Past(struct.PyTreeNode):
    """Keys and values of earlier calls.

    Attributes:
        k, v: [..., B, N, S, H].
        filled: int32, scalar or [B]: the first `filled` of the S slots are visible. A ring that is full is filled
            from end to end; the order of the slots does not matter.
        index: picks the leading axes of `k` and `v`, such as Euler step and layer.
        position_k: [S, D], the `position_k` of the slots; None without relative positions.
    """

    k: jax.Array
    v: jax.Array
    filled: jax.Array
    index: tuple[jax.Array, ...] = ()
    position_k: jax.Array | None = None


def masked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    past: Sequence[Past] = (),
    position_q: jax.Array | None = None,
    position_k: jax.Array | None = None,
) -> jax.Array:
    """Attention under a mask, and to caches: q [B, T, N, H], k and v [B, S, N, H] -> [B, T, N, H].

    Args:
        mask: bool [1 or B, 1 or T, S], which of the keys `k` each query sees.
        past: caches, whose filled slots every query sees. They are only read, each key once, and the cost follows how
            far they are filled.
        position_q: [B, T, N, D] for relative positions: their product with `position_k` is added to the scores
            before scaling.
        position_k: [S, D], shared by the heads.
    """
    scale = q.shape[-1] ** -0.5
    q, k, v = (rearrange(x, "B T N H -> B N T H") for x in (q * scale, k, v))
    if position_q is not None:
        position_q = rearrange(position_q, "B T N D -> B N T D") * scale
    if not past and q.shape[2] > QUERY_BLOCK:
        return rearrange(_in_query_blocks(q, k, v, mask, position_q, position_k), "B N T H -> B T N H")
    scores = jnp.where(mask[:, None], _scores(q, k, position_q, position_k), MASKED_SCORE)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    softmax = (top, weights.sum(-1, keepdims=True), weights @ v)
    for part in past:
        softmax = _over_cache(q, position_q, part, softmax)
    _, total, values = softmax
    return rearrange(values / total, "B N T H -> B T N H").astype(v.dtype)


def chunk_mask(rows: int, valid: jax.Array, chunk: int | jax.Array | None) -> jax.Array:
    """The mask of attention in chunks, bool [B, T, S]: a query sees the valid keys up to the end of its own chunk.

    Args:
        rows: T; row 0 is the beginning of a chunk.
        valid: bool [B, S].
        chunk: rows of a chunk, one number or int32 [B]; None: every query sees all valid keys.
    """
    if chunk is None:
        return jnp.broadcast_to(valid[:, None, :], (valid.shape[0], rows, valid.shape[1]))
    if jnp.ndim(chunk):
        chunks = jnp.arange(rows)[None] // jnp.asarray(chunk)[:, None]
        return valid[:, None, :] & (chunks[:, None, :] <= chunks[:, :, None])
    chunks = jnp.arange(rows) // chunk
    return valid[:, None, :] & (chunks[None, :] <= chunks[:, None])[None]


# `attention` and `causal_attention`


def _divides(q: jax.Array | jax.ShapeDtypeStruct, length: int, size: int) -> bool:
    return q.shape[1] % length == 0 and q.shape[3] % size == 0


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    rows: jax.Array | None,
) -> jax.Array:
    """Heads first, block of queries after block of queries, each with the keys up to its own end only."""
    T = q.shape[1]
    H = q.shape[3]
    q = rearrange(q / math.sqrt(H), "B T (K G) H -> B K G T H", K=k.shape[2]).astype(k.dtype)
    k = rearrange(k, "B S K H -> B K S H")
    v = rearrange(v, "B S K H -> B K S H")
    if rows is not None:  # a part of the sequence: they may see any of it
        y = _block(q, k, v, _visible(rows, segment_ids, key_segment_ids, slice(None), k.shape[2]))
        return rearrange(y, "B K G T H -> B T (K G) H")
    size = max(SMALLEST_BLOCK, math.ceil(T / BLOCKS))
    starts = list(range(0, T, size))
    # Divided, not sliced: the gradient of a slice is as long as the whole.
    q_blocks = jnp.split(q, starts[1:], 3)
    k_blocks = jnp.split(k, starts[1:], 2)
    v_blocks = jnp.split(v, starts[1:], 2)
    parts = []
    for i, start in enumerate(starts):
        end = min(start + size, T)
        visible = _visible(jnp.arange(start, end), segment_ids, key_segment_ids, slice(start, end), end)
        parts.append(_block(q_blocks[i], _joined(k_blocks[: i + 1], 2), _joined(v_blocks[: i + 1], 2), visible))
    return rearrange(_joined(parts, 3), "B K G T H -> B T (K G) H")


def _visible(
    rows: jax.Array,
    segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    queries: slice,
    columns: int,
) -> jax.Array:
    """bool [1 or B, 1, rows, columns]: which of the first `columns` keys each of these queries sees."""
    causal = (rows[:, None] >= jnp.arange(columns)[None])[None, None]
    if segment_ids is None or key_segment_ids is None:
        return causal
    return causal & _same_segment(segment_ids[:, queries], key_segment_ids[:, :columns])


def _joined(parts: Sequence[jax.Array], axis: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _block(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """q [B, K, G, T, H], k and v [B, K, S, H], visible bool [B, 1, T, S] -> [B, K, G, T, H].

    Normalised last: two plain batched products around one pass over the scores, forward and back.
    """
    G, T = q.shape[2:4]
    q = rearrange(q, "B K G T H -> B K (G T) H")
    scores = jnp.einsum("BKTH,BKSH->BKTS", q, k, preferred_element_type=jnp.float32)
    scores = rearrange(scores, "B K (G T) S -> B K G T S", G=G, T=T) + jnp.where(visible, 0.0, MASKED)[:, :, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    weights = rearrange(weights, "B K G T S -> B K (G T) S")
    y = jnp.einsum("BKTS,BKSH->BKTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    y = (y / weights.sum(-1, keepdims=True)).astype(v.dtype)
    return rearrange(y, "B K (G T) H -> B K G T H", G=G, T=T)


def _same_segment(segment_ids: jax.Array, key_segment_ids: jax.Array) -> jax.Array:
    return (segment_ids[:, :, None] == key_segment_ids[:, None])[:, None]


def _head_by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    heads = tuple(rearrange(x, "B N T H -> (B N) T H") for x in (q, k, v))
    y: jax.Array = jax.lax.map(lambda head: _causal_head(*head), heads)
    return rearrange(y, "(B N) T H -> B N T H", B=q.shape[0])


def _causal_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One head, [T, H] each, block after block of queries, each with the keys up to its own end only.

    Plain matrix products: those of `_block`, which have batch dimensions, take twice as long on a CPU.
    """
    T = q.shape[0]
    q = q * q.shape[-1] ** -0.5
    blocks = []
    for start in range(0, T, HEAD_BLOCK):
        end = min(start + HEAD_BLOCK, T)
        scores = q[start:end] @ k[:end].T
        visible = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
        blocks.append(jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)) @ v[:end])
    return jnp.concatenate(blocks)


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    rows: jax.Array | None,
) -> jax.Array:
    # Packed rows need a mask of the segments; cuDNN takes it as a bias and applies causality itself.
    mask = None
    if segment_ids is not None and key_segment_ids is not None:
        mask = _same_segment(segment_ids, key_segment_ids)
    if rows is not None:
        causal = (rows[:, None] >= jnp.arange(k.shape[1])[None])[None, None]
        mask = causal if mask is None else mask & causal
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=rows is None, implementation="cudnn")


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    interpret: bool = False,
    *,
    key_segment_ids: jax.Array | None = None,
    kernel: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Splash attention, the blockwise kernel for TPU; `interpret` runs it on a CPU, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    B, T, N, H = q.shape
    run = splash_kernel(T, N, interpret=interpret) if kernel is None else kernel
    if segment_ids is None:
        segment_ids = jnp.zeros((B, T), jnp.int32)
        key_segment_ids = jnp.zeros(k.shape[:2], jnp.int32)
    elif key_segment_ids is None:
        key_segment_ids = segment_ids
    q, k, v = (rearrange(x, "B T N H -> B N T H") for x in (q / math.sqrt(H), k, v))

    def run_item(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, key_segments: jax.Array) -> jax.Array:
        return run(q, k, v, splash_attention.SegmentIds(segments, key_segments))

    y: jax.Array = jax.vmap(run_item)(q, k, v, segment_ids, key_segment_ids)
    return rearrange(y, "B N T H -> B T N H").astype(v.dtype)


def splash_kernel(length: int, heads: int, head_parts: int = 1, parts: int = 1, interpret: bool = False) -> Any:
    """The splash kernel for sequences of `length` rows.

    Args:
        heads: query heads.
        head_parts: the number of devices that the query heads are divided among.
        parts: the number of devices that the queries' rows are divided among; each has all keys.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length), shard_count=parts)] * heads)
    keys = math.gcd(length, 4 * SPLASH_BLOCK)
    queries = math.gcd(length // parts, 4 * SPLASH_BLOCK)
    blocks = splash_attention.BlockSizes(
        block_q=queries,
        block_q_dkv=queries,
        block_q_dq=queries,
        block_kv=keys,
        block_kv_compute=keys,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_kv_dq=keys,
    )
    return splash_attention.make_splash_mha(
        mask,
        head_shards=head_parts,
        q_seq_shards=parts,
        block_sizes=blocks,
        interpret=interpret,
    )


# `cached_attention`


def _grouped_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    return scores / math.sqrt(q.shape[-1])


def _grouped_values(weights: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


# `masked_attention`


def _scores(q: jax.Array, k: jax.Array, position_q: jax.Array | None, position_k: jax.Array | None) -> jax.Array:
    scores = jnp.einsum("BNTH,BNSH->BNTS", q, k)
    if position_q is None:
        return scores
    return scores + jnp.einsum("BNTD,SD->BNTS", position_q, position_k)


def _in_query_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    position_q: jax.Array | None,
    position_k: jax.Array | None,
) -> jax.Array:
    """Exact attention without all scores at once: the memory grows with the keys, not with queries times keys."""
    rows = q.shape[2]
    blocks = -(-rows // QUERY_BLOCK)
    size = -(-rows // blocks)

    def split(x: jax.Array, axis: int) -> jax.Array:
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, blocks * size - rows)
        shape = (*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, pads).reshape(shape), axis, 0)

    def block(parts: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q, mask, position_q = parts
        scores = jnp.where(mask[:, None], _scores(q, k, position_q, position_k), MASKED_SCORE)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        return (weights @ v) / weights.sum(-1, keepdims=True)

    mask = jnp.broadcast_to(mask, (mask.shape[0], rows, mask.shape[2]))
    parts = split(q, 2), split(mask, 1), None if position_q is None else split(position_q, 2)
    y: jax.Array = jax.lax.map(block, parts)
    return rearrange(y, "blocks B N size H -> B N (blocks size) H")[:, :, :rows]


Softmax = tuple[jax.Array, jax.Array, jax.Array]  # running maximum, sum of the weights, weighted values


def _over_cache(q: jax.Array, position_q: jax.Array | None, past: Past, softmax: Softmax) -> Softmax:
    """Adds the filled part of a cache to a running softmax, a block of keys at a time."""
    lead = past.k.ndim - 4
    slots = past.k.shape[-2]
    size = min(KEY_BLOCK, slots)
    filled = jnp.reshape(past.filled, (-1, 1, 1, 1))

    def body(i: jax.Array, softmax: Softmax) -> Softmax:
        top, total, values = softmax
        # The last block of a cache that is no multiple of the block moves back and masks what was counted already.
        start = jnp.minimum(i * size, slots - size)
        at: tuple[Any, ...] = (*past.index, 0, 0, start, 0)
        shape = (*(1,) * lead, *past.k.shape[lead:-2], size, past.k.shape[-1])
        k = jax.lax.dynamic_slice(past.k, at, shape).reshape(shape[lead:]).astype(q.dtype)
        v = jax.lax.dynamic_slice(past.v, at, shape).reshape(shape[lead:]).astype(q.dtype)
        position_k = None
        if past.position_k is not None:
            position_k = jax.lax.dynamic_slice_in_dim(past.position_k, start, size)
        slot = (start + jnp.arange(size))[None, None, None]
        visible = (slot >= i * size) & (slot < filled)
        scores = jnp.where(visible, _scores(q, k, position_q, position_k), MASKED_SCORE)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        shrink = jnp.exp(top - new_top)
        return new_top, total * shrink + weights.sum(-1, keepdims=True), values * shrink + weights @ v

    blocks = (jnp.max(past.filled) + size - 1) // size
    result: Softmax = jax.lax.fori_loop(0, blocks, body, softmax)
    return result

"""Causal attention: without a cache picked by backend, with a cache in two parts under one softmax.

Grouped queries: N query heads share K key/value heads, head n reads key/value head n // (N / K). Keys and values are
never repeated in memory. Scores are scaled by 1/sqrt(H); softmax is float32.
"""

import math

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query that sees nothing gives numbers, not NaN
SPLASH_BLOCK = 128  # splash wants lengths and head size in multiples of this


def attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids=None, implementation: str = "auto") -> jax.Array:
    """Causal self-attention over whole sequences: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    Args:
        segment_ids: int [B, T]; a position sees only positions of its own segment. With left padding the padding is
            segment 0 and the rest 1. None: one segment.
        implementation: "xla" (the reference), "cudnn" (NVIDIA GPU, bfloat16 or float16), "splash" (TPU), or "auto":
            the fastest of them that this backend and these shapes allow.
    """
    if implementation == "auto":
        implementation = fastest(jax.default_backend(), q)
    return {"xla": _xla, "cudnn": _cudnn, "splash": splash}[implementation](q, k, v, segment_ids)


def fastest(backend: str, q: jax.Array) -> str:
    """The name of the implementation to use on `backend` ("cpu", "gpu", "tpu") for queries like q [B, T, N, H]."""
    if backend == "tpu" and _divides(q, SPLASH_BLOCK, SPLASH_BLOCK):
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
    past, new = jnp.exp(past - top), jnp.exp(new - top)
    total = past.sum(-1) + new.sum(-1)  # [B, K, G, T]
    y = _weighted(past, past_v) + _weighted(new, v)
    return _ungrouped(y / total.transpose(0, 3, 1, 2)[..., None], v.dtype)


def _divides(q, length: int, size: int) -> bool:
    return q.shape[1] % length == 0 and q.shape[3] % size == 0


def _xla(q, k, v, segment_ids=None):
    length = q.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None, None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None])[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, _scores(_grouped(q, k.shape[2]), k), MASKED), -1)
    return _ungrouped(_weighted(weights, v), v.dtype)


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


def _cudnn(q, k, v, segment_ids=None):
    # Packed rows need a mask of the segments; cuDNN takes it as a bias and applies causality itself.
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def splash(q, k, v, segment_ids=None, interpret: bool = False) -> jax.Array:
    """Splash attention, the blockwise kernel for TPU; `interpret` runs it on a CPU, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    B, T, N, H = q.shape
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * N)
    block = math.gcd(T, 4 * SPLASH_BLOCK)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = splash_attention.BlockSizes(**{f"block_{name}": block for name in names})
    kernel = splash_attention.make_splash_mha(
        mask, head_shards=1, q_seq_shards=1, block_sizes=blocks, interpret=interpret
    )
    if segment_ids is None:
        segment_ids = jnp.zeros((B, T), jnp.int32)
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q / math.sqrt(H), k, v))
    y = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash_attention.SegmentIds(s, s)))(*heads_first, segment_ids)
    return y.transpose(0, 2, 1, 3).astype(v.dtype)

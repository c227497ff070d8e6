"""The two next-token losses, without logits of all rows at once.

A batch is target-aligned: `loss_weights[b, t, c]` weighs the prediction of row t's own id in channel c, which is made
from the hidden state of row t - 1. The means are over the whole global batch: each micro-batch divides by the global
sums of weights, so that accumulation changes nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moss_jax.nn.layers import product
from moss_jax.sharding import RULES, per_device

CHUNK_ROWS = 1024  # rows of logits that one device holds at a time
SMALL = 1 << 24  # up to so many logits are held at once


def next_row_targets(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What row t predicts, {name: [B, T, ...]}: `labels` int32 [B, T, 2], `weights` float32 [B, T, 2], `source` [B, T].

    The last row predicts nothing: its weight is 0.
    """
    weights = jnp.roll(batch["loss_weights"], -1, 1).at[:, -1].set(0)
    source = jnp.roll(batch["source"], -1, 1) if "source" in batch else jnp.zeros(weights.shape[:2], jnp.int32)
    return {"labels": jnp.roll(batch["grid"], -1, 1), "weights": weights, "source": source}


def token_nll(
    x: jax.Array, kernel: jax.Array, labels: jax.Array, chunk_rows: int = CHUNK_ROWS, small: int = SMALL
) -> jax.Array:
    """-log softmax(x kernel)[label] for every row, float32 [B, T].

    On a mesh all devices divide the rows, whatever axes it has, and the kernel is gathered to each once: no logits
    travel, and its gradient is summed once. A device computes `chunk_rows` rows of logits at a time, and again in the
    backward pass; with no more than `small` logits in all it holds them. The product runs in the dtype of x, the
    softmax in float32.

    Args:
        x: [B, T, D], after the branch's norm.
        kernel: [D, V].
        labels: int32 [B, T].
    """
    rows = ("batch", "row")
    kernel_axes = ("all embed", "all vocab")
    local = per_device(
        lambda x, kernel, labels: _local_nll(x, kernel, labels, chunk_rows, small),
        ((*rows, None), kernel_axes, rows),
        rows,
        RULES | {"row": (*RULES["length"], *RULES["vocab"])},
    )
    return local(x, kernel.astype(x.dtype), labels)


def channel_sums(
    nll: jax.Array, weights: jax.Array, source: jax.Array, sources: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted sum of the losses [], and by source the sums and the counts [S]; rows of weight 0 do not count."""
    weighted = jnp.where(weights > 0, nll, 0.0) * weights
    member = source[..., None] == jnp.arange(sources)
    by_source = jnp.einsum("BT,BTS->S", weighted, member.astype(jnp.float32), precision="highest")
    counts = jnp.einsum("BT,BTS->S", weights, member.astype(jnp.float32), precision="highest")
    return weighted.sum(), by_source, counts


def _local_nll(x, kernel, labels, chunk_rows: int, small: int):
    batch, length, _ = x.shape
    chunks = 1 if batch * length * kernel.shape[1] <= small else _chunks(batch * length, chunk_rows)
    flat = x.reshape(chunks, -1, x.shape[-1])
    labels = labels.reshape(chunks, -1)
    if chunks == 1:
        return _chunk_nll(flat[0], kernel, labels[0]).reshape(batch, length)

    def body(_, rows):
        return None, jax.checkpoint(_chunk_nll, prevent_cse=False)(rows[0], kernel, rows[1])

    return jax.lax.scan(body, None, (flat, labels))[1].reshape(batch, length)


def _chunk_nll(x, kernel, labels):
    logits = product(x, kernel, 1, jnp.float32)
    picked = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return jax.nn.logsumexp(logits, -1) - picked


def _chunks(rows: int, most: int) -> int:
    """The smallest number of equal chunks of at most `most` rows."""
    return next(n for n in range(math.ceil(rows / most), rows + 1) if rows % n == 0)


def mean_or_zero(total: Any, count: Any) -> jax.Array:
    """total / count, 0 where nothing counts."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)

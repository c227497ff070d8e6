"""Next-token losses by channel, without materialising the logits of all rows.

A batch is target-aligned: `loss_weights[b, t, c]` weighs the prediction of row t's own id in channel c, which is made
from the hidden state of row t - 1. The means are over the whole global batch: each micro-batch divides by the global
sums of weights, so that gradient accumulation changes nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from moss_jax.nn.layers import product
from moss_jax.sharding import RULES, per_device

CHUNK_ROWS = 1024  # rows of logits per device: 1024 x 151,680 in float32 are 0.6 GB
MAX_LOGITS = 1 << 24  # up to this many (64 MB) are computed in one piece and kept for the backward pass


def next_row_targets(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The targets of row t: `labels` int32 [B, T, 2], `weights` float32 [B, T, 2], `source` int32 [B, T].

    The last row has no target: its weight is 0.
    """
    weights = jnp.roll(batch["loss_weights"], -1, 1).at[:, -1].set(0)
    source = jnp.roll(batch["source"], -1, 1) if "source" in batch else jnp.zeros(weights.shape[:2], jnp.int32)
    return {"labels": jnp.roll(batch["grid"], -1, 1), "weights": weights, "source": source}


def token_nll(
    x: jax.Array, kernel: jax.Array, labels: jax.Array, chunk_rows: int = CHUNK_ROWS, max_logits: int = MAX_LOGITS
) -> jax.Array:
    """-log softmax(x kernel)[label] for every row, float32 [B, T].

    On a mesh the rows are sharded over all devices, whatever its axes, and the kernel is gathered to each once: logits
    are not communicated, and the kernel's gradient is summed once. A device computes `chunk_rows` rows of logits at a
    time and recomputes them in the backward pass; it keeps them if there are at most `max_logits`. The product runs in
    the dtype of x, the softmax in float32.

    Args:
        x: [B, T, D], after the branch's norm.
        kernel: [D, V].
        labels: int32 [B, T].
        chunk_rows, max_logits: per device.
    """
    rows = ("batch", "row")
    kernel_axes = ("all embed", "all vocab")
    local = per_device(
        lambda x, kernel, labels: _local_nll(x, kernel, labels, chunk_rows, max_logits),
        ((*rows, None), kernel_axes, rows),
        rows,
        RULES | {"row": (*RULES["length"], *RULES["vocab"])},
    )
    return local(x, kernel.astype(x.dtype), labels)


def channel_sums(
    nll: jax.Array, weights: jax.Array, source: jax.Array, sources: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weighted sum of the losses [], the same by source [sources], sums of weights by source [sources]).

    Args:
        nll, weights: float32 [B, T]; rows of weight 0 do not count, even if their loss is not finite.
        source: int32 [B, T], below `sources`.
    """
    weighted = jnp.where(weights > 0, nll, 0.0) * weights
    member = source[..., None] == jnp.arange(sources)[None, None]
    by_source = jnp.einsum("BT,BTS->S", weighted, member.astype(jnp.float32), precision="highest")
    counts = jnp.einsum("BT,BTS->S", weights, member.astype(jnp.float32), precision="highest")
    return weighted.sum(), by_source, counts


def _local_nll(x: jax.Array, kernel: jax.Array, labels: jax.Array, chunk_rows: int, max_logits: int) -> jax.Array:
    batch, length = labels.shape
    rows = batch * length
    chunks = 1 if rows * kernel.shape[1] <= max_logits else _num_chunks(rows, chunk_rows)
    if chunks == 1:
        nll = _chunk_nll(rearrange(x, "B T D -> (B T) D"), kernel, rearrange(labels, "B T -> (B T)"))
        return rearrange(nll, "(B T) -> B T", B=batch)
    x = x.reshape(chunks, -1, x.shape[-1])
    labels = labels.reshape(chunks, -1)

    def body(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, jax.checkpoint(_chunk_nll, prevent_cse=False)(chunk[0], kernel, chunk[1])

    _, nll = jax.lax.scan(body, None, (x, labels))
    return nll.reshape(batch, length)


def _chunk_nll(x: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """x [rows, D], labels [rows] -> float32 [rows]."""
    logits = product(x, kernel, 1, jnp.float32)
    label_logits = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return jax.nn.logsumexp(logits, -1) - label_logits


def _num_chunks(rows: int, chunk_rows: int) -> int:
    """The smallest number of equal chunks of at most `chunk_rows` rows."""
    return next(n for n in range(math.ceil(rows / chunk_rows), rows + 1) if rows % n == 0)


def mean_or_zero(total: Any, count: Any) -> jax.Array:
    """total / count, 0 where the count is 0."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)

"""Vector quantisation: nearest codes, the straight-through gradient, and a codebook that follows its vectors.

A trained codebook has no gradient: each code is the moving average of the vectors that chose it, and a code that hardly
any vector chooses restarts at a random vector of the batch. Before the first update every code is such a code, so that
the codebook starts inside the data. Sources: van den Oord et al., arXiv 1711.00937, appendix A.1 (moving averages);
Dhariwal et al., arXiv 2005.00341 (restarts).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

TRAINED = 1e6  # updates, of a codebook that is trained already: its decay is the final one


def unit(x: jax.Array) -> jax.Array:
    """Vectors [..., C] divided by their length; zero vectors stay zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def nearest_codes(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
    """The nearest code of each vector, the first one of equals: [B, T, C] and [V, C] -> int32 [B, T]."""
    half_norms = jnp.square(codebook).sum(-1) / 2

    def nearest(rows: jax.Array) -> jax.Array:  # [T, C]; |row|^2 is the same for all codes and so left out
        product = jnp.matmul(rows, codebook.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(half_norms[None] - product, -1).astype(jnp.int32)

    # One clip at a time: all distances of a batch would take gigabytes.
    codes: jax.Array = jax.lax.map(nearest, vectors)
    return codes


def straight_through(vectors: jax.Array, quantized: jax.Array) -> jax.Array:
    """The quantised vectors, whose gradient goes to `vectors` as if they had not been quantised."""
    return vectors + jax.lax.stop_gradient(quantized - vectors)


def new_codebook(codebook: jax.Array, trained: bool) -> dict[str, jax.Array]:
    """The training state of a codebook [V, C].

    Returns:
        `codebook`; `count` [V], the moving average of how many vectors choose a code in an update; `sum` [V, C], that
        of the sum of these vectors; `age`, the updates so far.
    """
    # With a dtype, as an array without one has a weak type: the state that comes back from the first update has not,
    # and the step would be compiled twice.
    count = jnp.full(codebook.shape[0], 1.0 if trained else 0.0, jnp.float32)
    age = jnp.full((), TRAINED if trained else 0.0, jnp.float32)
    return {"codebook": codebook, "count": count, "sum": codebook * count[:, None], "age": age}


def ema_update(
    state: Mapping[str, jax.Array],
    vectors: jax.Array,
    codes: jax.Array,
    valid: jax.Array,
    key: jax.Array,
    *,
    max_decay: float,
    restart_below: float,
) -> dict[str, jax.Array]:
    """The state of `new_codebook` after a batch.

    Args:
        vectors: [B, T, C].
        codes: int32 [B, T], the codes that they chose.
        valid: bool [B, T].
        key: for the random vectors at which codes restart.
        max_decay: of the moving averages, once the codebook is old enough.
        restart_below: a code restarts when it is chosen less often than this share of the mean.
    """
    size = state["codebook"].shape[0]
    # While the encoder is new its vectors move quickly: averages over the last tenth of the updates follow them, and
    # codes that are left behind soon count as unused.
    decay = jnp.minimum(max_decay, (1 + state["age"]) / (10 + state["age"]))
    flat = vectors.reshape(-1, vectors.shape[-1])
    weights = valid.reshape(-1).astype(jnp.float32)
    chosen = jax.ops.segment_sum(weights, codes.reshape(-1), size)
    total = jax.ops.segment_sum(flat * weights[:, None], codes.reshape(-1), size)
    count = decay * state["count"] + (1 - decay) * chosen
    sums = decay * state["sum"] + (1 - decay) * total
    mean_count = weights.sum() / size
    unused = (count < restart_below * mean_count) | (state["count"].sum() == 0)
    sampled = jax.random.choice(key, flat.shape[0], (size,), p=weights / jnp.maximum(weights.sum(), 1))
    count = jnp.where(unused, mean_count, count)
    sums = jnp.where(unused[:, None], flat[sampled] * mean_count, sums)
    codebook = sums / jnp.maximum(count, 1e-8)[:, None]
    return {"codebook": codebook, "count": count, "sum": sums, "age": state["age"] + 1}

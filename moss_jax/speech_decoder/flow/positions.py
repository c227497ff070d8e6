"""Relative positions of the conformer, as in Transformer-XL, from absolute positions.

The score of query i and key j gains (q_i + v) . p_{i-j} with p_r = W PE(r), where PE(r) interleaves sin(r w_k) and
cos(r w_k). By the addition theorems this is the product of a vector that depends on i alone and PE(j). A cached key
therefore needs only its own absolute position, wherever it is in a cache: these are `position_q` and `position_k` of
`moss_jax.nn.attention.masked_attention`.
"""

import jax
import jax.numpy as jnp
import numpy as np

# A position is split into two digits of this base. 65,536 positions are more than the 60,000 mel frames of 20 minutes,
# four times the length of the released noise buffer.
BASE = 128
MAX_POSITION = 2**16


def sinusoids(positions: jax.Array, size: int) -> jax.Array:
    """PE of absolute positions, int [S] in 0..65535 -> float32 [S, size], exact to float32 rounding for all positions.

    sin(p w) in float32 is off by p * 6e-8, so p is split into high and low digits, whose tables are made in float64.
    """
    rates = np.exp(-np.arange(0, size, 2) * np.log(10000.0) / size)
    low = np.arange(BASE)[:, None] * rates
    high = np.arange(0, MAX_POSITION, BASE)[:, None] * rates
    low_sine = jnp.asarray(np.sin(low), jnp.float32)[positions % BASE]
    low_cosine = jnp.asarray(np.cos(low), jnp.float32)[positions % BASE]
    high_sine = jnp.asarray(np.sin(high), jnp.float32)[positions // BASE]
    high_cosine = jnp.asarray(np.cos(high), jnp.float32)[positions // BASE]
    sine = high_sine * low_cosine + high_cosine * low_sine
    cosine = high_cosine * low_cosine - high_sine * low_sine
    return jnp.stack([sine, cosine], -1).reshape(len(positions), size)


def relative_query(query: jax.Array, kernel: jax.Array, positions: jax.Array) -> jax.Array:
    """The vector c_i of each query with c_i . PE(j) = query_i . (W PE(i - j)).

    Args:
        query: [B, T, N, H].
        kernel: W, [D, N, H].
        positions: `sinusoids` of the queries' positions, [T, D].

    Returns:
        [B, T, N, D].
    """
    rows = jnp.einsum("BTNH,DNH->BTND", query, kernel)
    sine = positions[None, :, None, 0::2]
    cosine = positions[None, :, None, 1::2]
    a = rows[..., 0::2]
    b = rows[..., 1::2]
    return jnp.stack([b * sine - a * cosine, a * sine + b * cosine], -1).reshape(rows.shape)

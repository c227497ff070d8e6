"""Rotary position embedding, half-split: component i is rotated together with component i + H/2."""

import jax
import jax.numpy as jnp


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [B, T, H/2], for integer positions [B, T].

    Frequency i is theta ** (-2i / H); the angles are float32, since neighbouring positions are equal in
    bfloat16.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    # Computed once: XLA's CPU backend would recompute them for every head of every layer that is not in a loop.
    cosine, sine = jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))
    return cosine, sine


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the heads of x [B, T, N, H] by the angles [B, T, H/2]; the result has the dtype of x."""
    cos = cos[:, :, None]
    sin = sin[:, :, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)

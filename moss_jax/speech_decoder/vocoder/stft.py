"""The small STFT of the vocoder and its inverse, as matrix products with the window folded into the DFT matrices.

Both take signals whose valid part is shorter than the array, so that one compiled shape is used for many lengths.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


def hann(size: int) -> np.ndarray:
    """The periodic Hann window, float64 [size]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)


def _angles(size: int) -> np.ndarray:
    return 2 * np.pi * np.outer(np.arange(size), np.arange(size // 2 + 1)) / size  # [sample, bin]


def stft(x: jax.Array, size: int, hop: int, lengths: jax.Array | None = None) -> jax.Array:
    """Centred STFT with reflected ends, as torch.stft.

    Args:
        x: float32 [B, S]; S and every length are multiples of `hop`, and `hop` divides `size`.
        lengths: int32 [B], the valid samples of each item (more than `size / 2`); all of them when None.

    Returns:
        float32 [B, S / hop + 1, size + 2], real parts then imaginary parts. Frames after `lengths / hop` are undefined.
    """
    matrix = hann(size)[:, None] * np.concatenate([np.cos(_angles(size)), -np.sin(_angles(size))], 1)
    half = size // 2
    batch, samples = x.shape
    x = jnp.pad(x, ((0, 0), (half, half)))
    x = x.at[:, :half].set(x[:, 2 * half : half : -1])
    if lengths is None:
        lengths = jnp.full(batch, samples)

    def reflect_end(row: jax.Array, length: jax.Array) -> jax.Array:  # the padded row ends at half + length
        end = jax.lax.dynamic_slice(row, (length - 1,), (half,))
        return jax.lax.dynamic_update_slice(row, end[::-1], (half + length,))

    x = jax.vmap(reflect_end)(x, lengths)
    blocks = x.reshape(batch, -1, hop)
    count = samples // hop + 1
    frames = jnp.concatenate([blocks[:, i : i + count] for i in range(size // hop)], -1)  # [B, frames, size]
    return frames @ jnp.asarray(matrix, x.dtype)


def istft(spectrum: jax.Array, size: int, hop: int, valid: jax.Array | None = None) -> jax.Array:
    """The inverse of `stft`, as torch.istft: overlap-add divided by the overlap-added squared window.

    Args:
        spectrum: float32 [B, T, size + 2], real parts then imaginary (ignored in the first and last bin).
        valid: bool [B, T], the frames that exist; all of them when None.

    Returns:
        float32 [B, (T - 1) * hop]; samples after the centre of the last valid frame are undefined.
    """
    weights = np.full(size // 2 + 1, 2 / size)
    weights[[0, -1]] = 1 / size  # the first and the last bin have no mirror image
    real = weights * np.cos(_angles(size))
    imaginary = -weights * np.sin(_angles(size))
    imaginary[:, [0, -1]] = 0
    matrix = (hann(size)[:, None] * np.concatenate([real, imaginary], 1)).T  # [size + 2, size]
    frames = spectrum @ jnp.asarray(matrix, spectrum.dtype)
    squares = jnp.asarray(hann(size) ** 2, spectrum.dtype)[None, None]
    if valid is None:
        squares = jnp.broadcast_to(squares, (1, *frames.shape[1:]))
    else:
        frames = jnp.where(valid[..., None], frames, 0)
        squares = jnp.where(valid[..., None], squares, 0)
    envelope = jnp.maximum(_overlap_add(squares, hop), 1e-11)  # as in torch
    return (_overlap_add(frames, hop) / envelope)[:, size // 2 : -(size // 2)]


def _overlap_add(frames: jax.Array, hop: int) -> jax.Array:
    """[B, T, size] -> [B, (T - 1) * hop + size]."""
    batch, count, size = frames.shape
    parts = size // hop
    blocks = jnp.zeros((batch, count + parts - 1, hop), frames.dtype)
    for i in range(parts):
        blocks += jnp.pad(frames[..., i * hop : (i + 1) * hop], ((0, 0), (i, parts - 1 - i), (0, 0)))
    return rearrange(blocks, "B count hop -> B (count hop)")

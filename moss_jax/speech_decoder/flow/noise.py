"""The fixed noise from which every flow starts.

The reference draws it with torch's CPU generator after seed 0 and does not store it in its checkpoints. Here it is
rebuilt from the raw words of the same Mersenne twister, without torch.
"""

from functools import lru_cache

import numpy as np

REFERENCE_FRAMES = 15000
REFERENCE_BINS = 80


@lru_cache(maxsize=2)
def noise(frames: int = REFERENCE_FRAMES, mel_bins: int = REFERENCE_BINS) -> np.ndarray:
    """Normal noise float32 [1, frames, mel_bins], read-only; equal to the reference's buffer to about 5e-7.

    The buffer is filled row by row as [mel_bins, frames], so the value at a place depends on the sizes.
    """
    count = frames * mel_bins
    if count % 16:
        raise ValueError(f"{frames} frames of {mel_bins} bins: expected a multiple of 16 values")
    words = np.random.RandomState(0).randint(0, 2**32, count, np.uint32)  # the twister's raw words
    # Box-Muller on groups of 16: 8 radii, 8 angles. The reference works in float32 as well.
    uniform = ((words & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)).reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log1p(-uniform[:, 0]))
    angle = np.float32(2 * np.pi) * uniform[:, 1]
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    values = np.ascontiguousarray(values.reshape(mel_bins, frames).T)[None]
    values.flags.writeable = False
    return values

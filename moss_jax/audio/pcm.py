"""Waves as 16-bit samples and back: one scale and one rounding for files, streams and data sets."""

import numpy as np

SCALE = 32768  # what libsndfile divides by when it reads 16-bit files


def to_pcm16(wave: np.ndarray) -> np.ndarray:
    """Floats whose full scale is 1 -> little-endian int16 of the same shape, rounded; what exceeds 1 is clipped."""
    scaled = np.rint(np.asarray(wave, np.float32) * np.float32(SCALE))
    return np.clip(scaled, -SCALE, SCALE - 1).astype("<i2")


def from_pcm16(samples: np.ndarray) -> np.ndarray:
    """int16 -> float32 of the same shape, -1 to 1. `to_pcm16` gives back the same integers."""
    return np.asarray(samples).astype(np.float32) / np.float32(SCALE)

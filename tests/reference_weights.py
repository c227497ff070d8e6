"""Seeded random weights under the names of a released file: the same here and in the programs that make references."""

from collections.abc import Mapping

import numpy as np


def draw_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """{name: float32 array} for {released name: shape}, drawn in the order of the names; no bias is zero, no scale one.

    Matrices keep the variance of their input; scales are about one, biases and means about zero.
    """
    random = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.endswith(("running_var", "alpha", "original0")):
            value = random.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            value = name.endswith("weight") + 0.2 * random.standard_normal(shape)
        elif name.endswith("embedding.weight"):
            value = random.standard_normal(shape)
        else:
            value = random.standard_normal(shape) / np.prod(shape[1:]) ** 0.5
        weights[name] = value.astype(np.float32)
    return weights

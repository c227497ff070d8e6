"""Arrays that are distributed over a mesh: how a shape gets a sharding, and how an array is gathered on the host."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def with_sharding(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The same shape and dtype with a sharding."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def gather_to_host(value: jax.Array) -> np.ndarray:
    """The whole array in host memory, in every process; all processes must call it."""
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))

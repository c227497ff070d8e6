"""Batches on their way to the devices: each process reads its rows, each device gets its part of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from moss_jax.errors import MossError


def share(sharding: NamedSharding, rows: int) -> tuple[int, int]:
    """(index, count): this process's devices hold the index-th of `count` equal blocks of the rows of a batch.

    Processes whose devices divide something else than rows have the same block, and read the same rows.
    """
    spans = sharding.addressable_devices_indices_map((rows, *(1 for _ in sharding.spec[1:])))
    blocks = sorted({index[0].indices(rows)[:2] for index in spans.values()})
    first, last = blocks[0][0], blocks[-1][1]
    held = sum(stop - start for start, stop in blocks)
    if held != last - first or rows % held or first % held:
        raise MossError(f"rows {blocks} of a batch lie on this process, expected one block; order the mesh by process")
    return first // held, rows // held


class Feed:
    """This process's batches as arrays on the mesh.

    Args:
        batches: iterator of dicts of numpy arrays, this process's rows.
        shardings: {name: sharding} of the global batch.
        rows: of the global batch.
        first: the global number of this process's first row.
    """

    def __init__(
        self, batches: Iterator[Mapping[str, np.ndarray]], shardings: Mapping[str, Any], rows: int, first: int
    ):
        self._batches, self._shardings, self._rows, self._first = batches, shardings, rows, first

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        batch = next(self._batches)
        return {name: self._place(batch[name], sharding) for name, sharding in self._shardings.items()}

    def _place(self, local: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(self._rows)
            return local[(slice(start - self._first, stop - self._first), *index[1:])]

        return jax.make_array_from_callback((self._rows, *local.shape[1:]), sharding, part)

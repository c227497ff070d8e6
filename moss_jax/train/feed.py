"""Batches on the mesh: each process reads its share of the rows, each device receives its part of them."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moss_jax.data.batches import StepBatches
from moss_jax.sharding import fitting

OpenPart = Callable[[int, int], StepBatches]  # (index, count) -> the index-th of `count` equal parts of each batch
ShardingOf = Callable[[str, tuple[int, ...]], NamedSharding]  # (name, shape) of an array of a batch, rows first


class Feed:
    """An endless iterator over batches {name: array on the mesh}; `StepBatches` for all devices of a mesh.

    A process opens the rows that its devices hold: one block of them or, where the mesh does not follow the order of
    the processes, several. Processes whose devices divide another dimension than the rows read the same rows.

    Args:
        rows: number of rows of a batch.
        spans: the rows [start, stop) that each device of this process holds.
        open_part: opens a part of each batch.
        sharding_of: gives the sharding of each array.
    """

    def __init__(self, rows: int, spans: Iterable[tuple[int, int]], open_part: OpenPart, sharding_of: ShardingOf):
        indices, count = blocks(spans, rows)
        self._rows = rows
        self._block_size = rows // count
        self._sharding_of = sharding_of
        self._parts = {index: open_part(index, count) for index in indices}

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        parts = {index: next(batches) for index, batches in self._parts.items()}
        names = next(iter(parts.values()))
        return {name: self._to_mesh(name, {index: part[name] for index, part in parts.items()}) for name in names}

    def get_state(self) -> str:
        """The position as JSON; the same in every process."""
        return next(iter(self._parts.values())).get_state()

    def set_state(self, state: str) -> None:
        """Returns to the position of `get_state`. Raises MossError when that was a position in other data."""
        for batches in self._parts.values():
            batches.set_state(state)

    def skip_to(self, step: int) -> None:
        """Continues with the batch of `step`, counted from 0."""
        for batches in self._parts.values():
            batches.skip_to(step)

    def close(self) -> None:
        """Ends worker processes; the next batch starts them again."""
        for batches in self._parts.values():
            batches.close()

    def _to_mesh(self, name: str, blocks: dict[int, np.ndarray]) -> jax.Array:
        size = self._block_size

        def local(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(self._rows)
            pieces = [
                blocks[block][max(start - block * size, 0) : stop - block * size, *index[1:]]
                for block in range(start // size, -(-stop // size))
            ]
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

        shape = (self._rows, *next(iter(blocks.values())).shape[1:])
        return jax.make_array_from_callback(shape, self._sharding_of(name, shape), local)


def rows_feed(batch_size: int, mesh: Mesh, open_part: OpenPart) -> Feed:
    """A feed whose arrays are divided over the mesh by their rows only, such as batches of recordings."""

    def sharding_of(name: str, shape: tuple[int, ...]) -> NamedSharding:
        return fitting(("batch", *[None] * (len(shape) - 1)), shape, mesh)

    shape = (batch_size,)
    return Feed(batch_size, row_spans(sharding_of("", shape), shape), open_part, sharding_of)


def row_spans(sharding: NamedSharding, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The rows [start, stop) of an array that each device of this process holds."""
    spans = []
    for index in sharding.addressable_devices_indices_map(shape).values():
        assert index is not None
        start, stop, _ = index[0].indices(shape[0])
        spans.append((start, stop))
    return spans


def blocks(spans: Iterable[tuple[int, int]], rows: int) -> tuple[list[int], int]:
    """Divides `rows` into the largest equal blocks of which the spans [start, stop) are made.

    Returns:
        (indices of the blocks in the spans, number of blocks in all rows)
    """
    held = sorted(set(itertools.chain.from_iterable(range(*span) for span in spans)))
    consecutive: list[list[int]] = []  # [start, stop) of adjacent rows
    for row in held:
        if consecutive and consecutive[-1][1] == row:
            consecutive[-1][1] = row + 1
        else:
            consecutive.append([row, row + 1])
    size = math.gcd(rows, *itertools.chain.from_iterable(consecutive))
    return sorted({row // size for row in held}), rows // size

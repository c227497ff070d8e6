"""Batches on their way to the devices: each process reads its rows, each device gets its part of them."""

import itertools
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moss_jax.data import Mixture, open_batches
from moss_jax.train.run import Run
from moss_jax.train.step import batch_shardings
from moss_jax.transformer import TransformerConfig


class Feed:
    """The batches of a mixture as arrays on the mesh, an iterator without end.

    A process opens the rows that its devices hold, as one block or, where the mesh does not follow the processes, as
    several. Processes whose devices divide something else than rows read the same rows.

    Args:
        mixture: of the run, or what it holds out; batches have the run's size.
        workers: processes that read and pack ahead; 0: threads.

    Attributes:
        source_names: the name of each index in the batches' `source`.
    """

    def __init__(self, mixture: Mixture, config: TransformerConfig, run: Run, mesh: Mesh, workers: int = 0):
        self._rows, self._shardings = run.batch_size, batch_shardings(mesh, (run.batch_size, run.context))
        indices, count = blocks(_spans(self._shardings["positions"], (run.batch_size, run.context)), run.batch_size)
        self._size = run.batch_size // count
        self._parts = {
            index: open_batches(
                mixture, config, context=run.context, batch_size=run.batch_size, process_index=index,
                process_count=count, workers=workers,
            )
            for index in indices
        }  # fmt: skip
        self.source_names = self._one.source_names

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        parts = {index: next(batches) for index, batches in self._parts.items()}
        return {
            name: self._place({index: part[name] for index, part in parts.items()}, sharding)
            for name, sharding in self._shardings.items()
        }

    def get_state(self) -> str:
        """Where the iterator stands; the same in every process."""
        return self._one.get_state()

    def set_state(self, state: str) -> None:
        """Goes where `get_state` was called. Raises MossError when that was with other data."""
        for batches in self._parts.values():
            batches.set_state(state)

    def skip_to(self, step: int) -> None:
        """The global batch of `step` comes next."""
        for batches in self._parts.values():
            batches.skip_to(step)

    def close(self) -> None:
        for batches in self._parts.values():
            batches.close()

    @property
    def _one(self):
        return next(iter(self._parts.values()))

    def _place(self, parts: dict[int, np.ndarray], sharding: NamedSharding) -> jax.Array:
        def local(at: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = at[0].indices(self._rows)
            rows = [
                parts[index][max(start - index * self._size, 0) : stop - index * self._size, *at[1:]]
                for index in range(start // self._size, -(-stop // self._size))
            ]
            return rows[0] if len(rows) == 1 else np.concatenate(rows)

        one = next(iter(parts.values()))
        return jax.make_array_from_callback((self._rows, *one.shape[1:]), sharding, local)


def blocks(spans: Iterable[tuple[int, int]], rows: int) -> tuple[list[int], int]:
    """(indices, count): the spans [start, stop) of rows are these of `count` equal blocks, as large as can be."""
    held = sorted(set(itertools.chain.from_iterable(range(*span) for span in spans)))
    runs = []  # [start, stop) of rows that follow each other
    for row in held:
        if runs and runs[-1][1] == row:
            runs[-1][1] = row + 1
        else:
            runs.append([row, row + 1])
    size = math.gcd(rows, *itertools.chain.from_iterable(runs))
    return sorted({row // size for row in held}), rows // size


def _spans(sharding: NamedSharding, shape: tuple[int, int]) -> list[tuple[int, int]]:
    return [at[0].indices(shape[0])[:2] for at in sharding.addressable_devices_indices_map(shape).values()]

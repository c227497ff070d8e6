"""Batches on their way to the devices: each process reads its rows, each device gets its part of them."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moss_jax.data import Mixture, open_batches
from moss_jax.data.pipeline import PackedBatches
from moss_jax.sharding import fitting
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.train.run import Run
from moss_jax.train.speech_lm.step import batch_shardings


class RowFeed:
    """Batches as arrays on the mesh, an iterator without end.

    A process opens the rows that its devices hold, as one block or, where the mesh does not follow the processes, as
    several. Processes whose devices divide something else than rows read the same rows.

    Args:
        rows: of a batch.
        spans: the rows [start, stop) that each device of this process holds.
        open_part: (index, count) -> the iterator over the index-th of `count` equal parts of each batch, with the
            methods of `moss_jax.data.batches.StepBatches`.
        place: (name, shape) -> how an array of a batch lies on the mesh; its first dimension is the rows.
    """

    def __init__(
        self,
        rows: int,
        spans: Iterable[tuple[int, int]],
        open_part: Callable[[int, int], Any],
        place: Callable[[str, tuple[int, ...]], NamedSharding],
    ):
        indices, count = blocks(spans, rows)
        self._rows = rows
        self._size = rows // count
        self._sharding = place
        self._parts = {index: open_part(index, count) for index in indices}

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        parts = {index: next(batches) for index, batches in self._parts.items()}
        names = next(iter(parts.values()))
        return {name: self._place(name, {index: part[name] for index, part in parts.items()}) for name in names}

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

    def _place(self, name: str, parts: dict[int, np.ndarray]) -> jax.Array:
        def local(at: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = at[0].indices(self._rows)
            rows = [
                parts[index][max(start - index * self._size, 0) : stop - index * self._size, *at[1:]]
                for index in range(start // self._size, -(-stop // self._size))
            ]
            return rows[0] if len(rows) == 1 else np.concatenate(rows)

        shape = (self._rows, *next(iter(parts.values())).shape[1:])
        return jax.make_array_from_callback(shape, self._sharding(name, shape), local)


class Feed(RowFeed):
    """The packed batches of a mixture.

    Args:
        mixture: of the run, or what it holds out; batches have the run's size.
        workers: processes that read and pack ahead; 0: threads.

    Attributes:
        source_names: the name of each index in the batches' `source`.
    """

    def __init__(self, mixture: Mixture, config: SpeechLMConfig, run: Run, mesh: Mesh, workers: int = 0):
        shape = (run.batch_size, run.context)
        shardings = batch_shardings(mesh, shape)

        def open_part(index: int, count: int) -> PackedBatches:
            return open_batches(
                mixture,
                config,
                context=run.context,
                batch_size=run.batch_size,
                process_index=index,
                process_count=count,
                workers=workers,
            )

        super().__init__(
            run.batch_size, _spans(shardings["positions"], shape), open_part, lambda name, _: shardings[name]
        )
        self.source_names = self._one.source_names


class ClipFeed(RowFeed):
    """Batches of recordings (`ClipBatches`, `DecoderBatches`); only their rows are divided over devices.

    Args:
        open_part: (index, count) -> one of `count` equal parts of each batch.

    """

    def __init__(self, batch_size: int, mesh: Mesh, open_part: Callable[[int, int], Any]):
        def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
            return fitting(("batch", *[None] * (len(shape) - 1)), shape, mesh)

        super().__init__(batch_size, _spans(place("", (batch_size,)), (batch_size,)), open_part, place)

    @property
    def per_epoch(self) -> int:
        """Batches in which every clip is once, of data that has such."""
        return self._one.per_epoch


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


def _spans(sharding: NamedSharding, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [at[0].indices(shape[0])[:2] for at in sharding.addressable_devices_indices_map(shape).values()]

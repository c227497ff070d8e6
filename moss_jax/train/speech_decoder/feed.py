"""Batches of recordings on their way to the devices, rows divided over data and fsdp."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from moss_jax.data import Mixture
from moss_jax.data.spoken_batches import SpokenBatches
from moss_jax.sharding import fitting
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.train.feed import blocks


class SpokenFeed:
    """An iterator without end over batches that lie on the mesh: each process reads the rows that its devices hold.

    Args:
        sizes: `codes` or `frames` of `SpokenBatches`.
    """

    def __init__(
        self, mixture: Mixture, config: SpeechDecoderConfig, mesh: Mesh, batch_size: int, workers: int, **sizes
    ):
        self._rows, self._mesh = batch_size, mesh
        held = self._sharding((batch_size,)).addressable_devices_indices_map((batch_size,)).values()
        indices, count = blocks([at[0].indices(batch_size)[:2] for at in held], batch_size)
        self._size = batch_size // count
        self._parts = {
            index: SpokenBatches(
                mixture, config, batch_size=batch_size, process_index=index, process_count=count, workers=workers,
                **sizes,
            )
            for index in indices
        }  # fmt: skip

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        parts = {index: next(batches) for index, batches in self._parts.items()}
        names = next(iter(parts.values()))
        return {name: self._place({index: part[name] for index, part in parts.items()}) for name in names}

    def get_state(self) -> str:
        return self._one.get_state()

    def set_state(self, state: str) -> None:
        for batches in self._parts.values():
            batches.set_state(state)

    def skip_to(self, step: int) -> None:
        for batches in self._parts.values():
            batches.skip_to(step)

    def close(self) -> None:
        for batches in self._parts.values():
            batches.close()

    @property
    def _one(self) -> SpokenBatches:
        return next(iter(self._parts.values()))

    def _sharding(self, shape: tuple[int, ...]):
        return fitting(("batch", *(None,) * (len(shape) - 1)), shape, self._mesh)

    def _place(self, parts: dict[int, np.ndarray]) -> jax.Array:
        shape = (self._rows, *next(iter(parts.values())).shape[1:])

        def local(at: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = at[0].indices(self._rows)
            rows = [
                parts[index][max(start - index * self._size, 0) : stop - index * self._size]
                for index in range(start // self._size, -(-stop // self._size))
            ]
            return np.concatenate(rows)[(slice(None), *at[1:])]

        return jax.make_array_from_callback(shape, self._sharding(shape), local)

"""Packed batches in an order that depends on (seed, global step) alone, read through Grain.

Each source is an endless sequence of packed rows, epoch after epoch, each epoch shuffled and packed anew. The rows of
all sources are mixed by weight into one sequence; row b of the global batch of step s is row s * batch_size + b of it.
All of this is random access, so that a process reads only its share and training can continue from any step.
"""

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.data.batches import StepBatches
from moss_jax.data.pack import PackingPlan, plan_packing
from moss_jax.data.store import Examples
from moss_jax.errors import MossError
from moss_jax.speech_lm import SpeechLMConfig

CACHED_EPOCHS = 2  # packings kept in memory: a batch may need the end of one epoch and the beginning of the next


@dataclass(frozen=True)
class Mixture:
    """Data sets to train on, mixed by weight.

    Attributes:
        sources: (name, folder, weight) each. Weights are shares of packed rows; they need not sum to 1.
        seed: of the order of examples, in every epoch, and of their packing.
    """

    sources: tuple[tuple[str, str, float], ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise MossError("mixture: has no source, expected at least one")
        names = [name for name, *_ in self.sources]
        if len(set(names)) != len(names):
            raise MossError(f"mixture: source names {', '.join(names)}, expected different names")
        for name, _, weight in self.sources:
            if not 0 < weight < float("inf"):
                raise MossError(f"mixture: source {name} has weight {weight}, expected a number > 0")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise MossError(f"mixture: seed is {self.seed!r}, expected an integer, 0 or more")


class PackedRows:
    """The endless packed rows of one source as a random-access sequence. May be pickled; private fields are made again
    then.

    Args:
        folder: of the examples.
        config: of the model; must match the examples' vocabulary.
        context: T, rows of the grid in a packed row.
        seed, index: of the mixture, and the position of the source in it.
    """

    def __init__(self, folder: str | Path, config: SpeechLMConfig, context: int, seed: int, index: int):
        self.examples = Examples(folder, config)
        self.config = config
        self.context = context
        self.seed = seed
        self.index = index
        self._initialize()

    def _initialize(self) -> None:
        self._lock = threading.Lock()
        self._plans: OrderedDict[int, PackingPlan] = OrderedDict()
        self._epoch_starts = [0]  # the first row of each epoch that is known

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._initialize()

    def __len__(self) -> int:
        return sys.maxsize // 2**20  # endless; small enough for the arithmetic of a mixture

    def __repr__(self) -> str:
        return f"PackedRows({str(self.examples.folder)!r}, context={self.context})"

    def plan(self, epoch: int) -> PackingPlan:
        """The packing of an epoch."""
        with self._lock:
            return self._plan(epoch)

    def _plan(self, epoch: int) -> PackingPlan:
        if epoch not in self._plans:
            random = np.random.default_rng([self.seed, self.index, epoch])
            self._plans[epoch] = plan_packing(self.examples.lengths, self.context, random)
            while len(self._plans) > CACHED_EPOCHS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(epoch)
        return self._plans[epoch]

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, row in it) of row `index`."""
        with self._lock:
            while index >= self._epoch_starts[-1]:
                epoch = len(self._epoch_starts) - 1
                self._epoch_starts.append(self._epoch_starts[-1] + len(self._plan(epoch)))
            epoch = int(np.searchsorted(self._epoch_starts, index, "right")) - 1
            return epoch, index - self._epoch_starts[epoch]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`: grid int32 [T, 2], positions, segment_ids, source int32 [T], loss_weights float32 [T, 2]."""
        epoch, row = self.locate(index)
        length = self.context
        config = self.config
        grid = np.empty((length, 2), np.int32)
        positions = np.zeros(length, np.int32)
        segment_ids = np.zeros(length, np.int32)
        weights = np.zeros((length, 2), np.float32)
        source = np.full(length, -1, np.int32)
        end = 0
        for segment, (index_of_example, start, stop) in enumerate(self.plan(epoch).row(row), 1):
            example = self.examples[index_of_example]
            begin = end
            end = end + stop - start
            grid[begin:end] = example.grid[start:stop]
            weights[begin:end] = example.loss_weights[start:stop]
            weights[begin] = 0  # the first row of a segment cannot be predicted
            positions[begin:end] = np.arange(stop - start, dtype=np.int32)
            segment_ids[begin:end] = segment
        source[:end] = self.index
        grid[end:] = config.endoftext_id, config.audio_pad_id
        return {
            "grid": grid,
            "positions": positions,
            "segment_ids": segment_ids,
            "loss_weights": weights,
            "source": source,
        }


class PackedBatches(StepBatches):
    """An endless iterator over this process's share of the global batches: dictionaries of arrays [B, T, ...].

    Attributes:
        source_names: the name of each index in the batches' `source`.
        step: of the next global batch.
    """

    def __init__(
        self,
        mixture: Mixture,
        config: SpeechLMConfig,
        *,
        context: int,
        batch_size: int,
        process_index: int,
        process_count: int,
        workers: int,
    ):
        _check(context, batch_size, process_index, process_count, workers)
        import grain

        self.source_names = tuple(name for name, *_ in mixture.sources)
        self.rows = [
            PackedRows(folder, config, context, mixture.seed, index)
            for index, (_, folder, _) in enumerate(mixture.sources)
        ]
        _check_one_text_tokenizer(self.rows)
        mixed = grain.MapDataset.mix(
            [grain.MapDataset.source(rows) for rows in self.rows], [weight for *_, weight in mixture.sources]
        )
        # The share of process p at step s is element s * process_count + p.
        shares = mixed.batch(batch_size // process_count, drop_remainder=True)
        super().__init__(
            shares[process_index::process_count],
            _fingerprint(mixture, self.rows, context, batch_size),
            "data, seed, weights, context or batch size",
            workers,
        )


def open_batches(
    mixture: Mixture,
    config: SpeechLMConfig,
    *,
    context: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> PackedBatches:
    """Opens the data sets of a mixture.

    Args:
        config: of the model that is trained.
        context: T, rows of the grid in a packed row.
        batch_size: packed rows in a global batch.
        process_index, process_count: this process gets rows process_index * share .. of each batch, share =
            batch_size / process_count.
        workers: processes that read and pack ahead; 0: threads of this process.

    Raises:
        MossError: a data set is missing, damaged or made for another vocabulary or text tokenizer, or the numbers do
            not fit together.
    """
    return PackedBatches(
        mixture,
        config,
        context=context,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        workers=workers,
    )


def _check(context: int, batch_size: int, process_index: int, process_count: int, workers: int) -> None:
    minimums = {
        "context": (context, 2),
        "batch_size": (batch_size, 1),
        "process_count": (process_count, 1),
        "workers": (workers, 0),
    }
    for name, (value, minimum) in minimums.items():
        if value < minimum:
            raise MossError(f"data: {name} is {value}, expected at least {minimum}")
    if not 0 <= process_index < process_count:
        raise MossError(f"data: process_index is {process_index}, expected 0 to {process_count - 1}")
    if batch_size % process_count:
        raise MossError(f"data: batch_size {batch_size} is not a multiple of the {process_count} processes")


def _check_one_text_tokenizer(rows: list[PackedRows]) -> None:
    folders: dict[str, Path] = {}  # of each text tokenizer the first data set
    for source in rows:
        if source.examples.about.get("text_tokenizer"):
            folders.setdefault(source.examples.about["text_tokenizer"], source.examples.folder)
    if len(folders) > 1:
        first, second = list(folders.values())[:2]
        raise MossError(f"{first} and {second}: made with different text tokenizers, expected the same for all sources")


def _fingerprint(mixture: Mixture, rows: list[PackedRows], context: int, batch_size: int) -> str:
    """Of everything that the order of data depends on, except the step."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([mixture.seed, context, batch_size]).encode())
    for source, (name, _, weight) in zip(rows, mixture.sources, strict=True):
        about = {key: value for key, value in source.examples.about.items() if key != "settings"}
        digest.update(json.dumps([name, weight, about], sort_keys=True).encode())
        digest.update(np.ascontiguousarray(source.examples.lengths).data)
    return digest.hexdigest()

"""Packed batches in an order that depends on (seed, global step) alone, read through Grain.

Each source gives packed rows without end, epoch after epoch, every epoch shuffled and packed anew. Rows of the sources
follow each other by weight; row b of the global batch of step s is row s * batch_size + b of that sequence. Everything
is random access, so that a process reads only its share and any step can be the next one.
"""

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moss_jax.data.batches import StepBatches
from moss_jax.data.pack import PackingPlan, plan_packing
from moss_jax.data.store import Examples
from moss_jax.errors import MossError
from moss_jax.speech_lm import TransformerConfig

CACHED_EPOCHS = 2  # packings kept in memory: a batch may need the end of one epoch and the beginning of the next


@dataclass(frozen=True)
class Mixture:
    """What is trained on.

    Attributes:
        sources: (name, folder of examples, weight) each. Weights are shares of packed rows; they need not sum to 1.
        seed: of order, packing and epochs.
    """

    sources: tuple[tuple[str, str, float], ...]
    seed: int = 0

    def __post_init__(self):
        if not self.sources:
            raise MossError("mixture: it has no source, expected one at least")
        names = [name for name, *_ in self.sources]
        if len(set(names)) != len(names):
            raise MossError(f"mixture: source names {', '.join(names)}, expected each once")
        for name, _, weight in self.sources:
            if not 0 < weight < float("inf"):
                raise MossError(f"mixture: source {name} has weight {weight}, expected a number above 0")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise MossError(f"mixture: seed is {self.seed!r}, expected a whole number, 0 or more")


class PackedRows:
    """The packed rows of one source, without end, as a random-access sequence. May be sent to processes.

    Args:
        folder: of the examples.
        config: of the model; must match the examples' vocabulary.
        context: T, rows of the grid in a packed row.
        seed, index: of the mixture, and the place of the source in it.
    """

    def __init__(self, folder: str | Path, config: TransformerConfig, context: int, seed: int, index: int):
        self.examples = Examples(folder, config)
        self.config = config
        self.context = context
        self.seed = seed
        self.index = index
        self._begin()

    def _begin(self):
        self._lock = threading.Lock()
        self._plans = OrderedDict()
        self._ends = [0]  # how many rows all epochs before this one have

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_plans", "_ends")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return sys.maxsize // 2**20  # no end; small enough for the arithmetic of a mixture

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

    def place(self, index: int) -> tuple[int, int]:
        """(epoch, row in it) of row `index`."""
        with self._lock:
            while index >= self._ends[-1]:
                self._ends.append(self._ends[-1] + len(self._plan(len(self._ends) - 1)))
            epoch = int(np.searchsorted(self._ends, index, "right")) - 1
            return epoch, index - self._ends[epoch]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`: grid int32 [T, 2], positions, segment_ids, source int32 [T], loss_weights float32 [T, 2]."""
        epoch, row = self.place(index)
        length = self.context
        config = self.config
        grid = np.empty((length, 2), np.int32)
        positions = np.zeros(length, np.int32)
        segment_ids = np.zeros(length, np.int32)
        weights = np.zeros((length, 2), np.float32)
        source = np.full(length, -1, np.int32)
        end = 0
        for segment, (example, start, stop) in enumerate(self.plan(epoch).row(row), 1):
            whole = self.examples[example]
            begin = end
            end = end + stop - start
            grid[begin:end] = whole.grid[start:stop]
            weights[begin:end] = whole.loss_weights[start:stop]
            weights[begin] = 0  # nothing stands before it in this row
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
    """An iterator over this process's share of the global batches: dictionaries of arrays [B, T, ...] without end.

    Attributes:
        source_names: the name of each index in the batches' `source`.
        step: of the global batch that comes next.
    """

    def __init__(
        self,
        mixture: Mixture,
        config: TransformerConfig,
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
        # The share of process p at step s is the (s * process_count + p)-th run of so many rows.
        shares = mixed.batch(batch_size // process_count, drop_remainder=True)
        super().__init__(
            shares[process_index::process_count],
            _fingerprint(mixture, self.rows, context, batch_size),
            "data, seed, weights, context or batch size",
            workers,
        )


def open_batches(
    mixture: Mixture,
    config: TransformerConfig,
    *,
    context: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> PackedBatches:
    """Opens the data sets of a mixture.

    Args:
        config: of the model that trains.
        context: T, rows of the grid in a packed row.
        batch_size: packed rows in a global batch.
        process_index, process_count: this process gets rows process_index * share .. of each batch, share =
            batch_size / process_count.
        workers: processes that read and pack ahead; 0: threads of this one.

    Raises:
        MossError: a data set is missing, damaged or made for another vocabulary or text tokenizer, or numbers do not
            fit together.
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
    numbers = {"context": (context, 2), "batch_size": (batch_size, 1), "process_count": (process_count, 1)}
    for name, (value, least) in (numbers | {"workers": (workers, 0)}).items():
        if value < least:
            raise MossError(f"data: {name} is {value}, expected {least} at least")
    if not 0 <= process_index < process_count:
        raise MossError(f"data: process_index is {process_index}, expected 0 to {process_count - 1}")
    if batch_size % process_count:
        raise MossError(f"data: batch_size {batch_size} does not divide by the {process_count} processes")


def _check_one_text_tokenizer(rows: list[PackedRows]) -> None:
    by_text_tokenizer = {}
    for source in rows:
        if source.examples.about.get("text_tokenizer"):
            by_text_tokenizer.setdefault(source.examples.about["text_tokenizer"], source.examples.folder)
    if len(by_text_tokenizer) > 1:
        one, other = list(by_text_tokenizer.values())[:2]
        raise MossError(f"{one} and {other}: made with different text tokenizers, expected the same for all sources")


def _fingerprint(mixture: Mixture, rows: list[PackedRows], context: int, batch_size: int) -> str:
    """Of everything that the order of data depends on but the step."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([mixture.seed, context, batch_size]).encode())
    for source, (name, _, weight) in zip(rows, mixture.sources, strict=True):
        about = {key: value for key, value in source.examples.about.items() if key != "settings"}
        digest.update(json.dumps([name, weight, about], sort_keys=True).encode())
        digest.update(np.ascontiguousarray(source.examples.lengths))
    return digest.hexdigest()

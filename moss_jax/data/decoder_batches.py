"""Batches of recordings for the speech decoder's training, in an order that depends on (seed, step) alone.

Row b of the batch of step s is row s * batch_size + b of an endless sequence, read through Grain as the language
model's is. A flow gets whole recordings, shuffled anew each epoch and cut at random where they are too long; a vocoder
gets random cuts, every frame as likely as any other.
"""

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from moss_jax.data.batches import StepBatches
from moss_jax.data.decoder_data import DecoderDataset
from moss_jax.data.pipeline import Mixture
from moss_jax.errors import MossError
from moss_jax.speech_decoder.config import SpeechDecoderConfig

SILENCE = float(np.log(1e-5))  # the mel's floor, after the end of a recording


class DecoderRows:
    """The endless rows of one source. May be sent to processes.

    Args:
        codes: of a row, for a flow: codes int32 [N], count int32 [], mel float32 [4N, M], embedding float32 [E].
        frames: of a row, for a vocoder (codes is None): mel float32 [T, M], wave float32 [hop * T], f0 float32 [T].
    """

    def __init__(
        self,
        folder: str | Path,
        config: SpeechDecoderConfig,
        seed: int,
        index: int,
        codes: int | None = None,
        frames: int = 0,
    ):
        self.spoken = DecoderDataset(folder, config, codes is not None)
        self.config = config
        self.seed = seed
        self.index = index
        self.codes = codes
        self.frames = frames
        self._begin()

    def _begin(self):
        self._lock = threading.Lock()
        self._orders = OrderedDict()
        self._ends = np.cumsum(self.spoken.counts, dtype=np.int64)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return sys.maxsize // 2**20  # no end; small enough for the arithmetic of a mixture

    def __repr__(self) -> str:
        return f"Rows({str(self.spoken.folder)!r})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng([self.seed, self.index, index])
        return self._cut(random) if self.codes is None else self._whole(index, random)

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                shuffle = np.random.default_rng([self.seed, self.index, epoch, 1])
                self._orders[epoch] = shuffle.permutation(len(self.spoken))
                while len(self._orders) > 2:
                    self._orders.popitem(last=False)
            return self._orders[epoch]

    def _whole(self, index: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        flow = self.config.flow
        size = self.config.flow.frames_per_code
        epoch, place = divmod(index, len(self.spoken))
        item = int(self._order(epoch)[place])
        there = int(self.spoken.counts[item]) // size
        count = min(there, self.codes)
        first = int(random.integers(there - count + 1))
        names = ("codes", "mel", *(("embedding",) if self.spoken.has_embeddings else ()))
        found = self.spoken.piece(item, first * size, count * size, *names)
        return {
            "codes": np.pad(found["codes"], (0, self.codes - count)),
            "count": np.int32(count),
            "mel": np.pad(found["mel"], ((0, (self.codes - count) * size), (0, 0))),
            "embedding": found.get("embedding", np.zeros(flow.speaker_size, np.float32)),
        }

    def _cut(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        item = int(np.searchsorted(self._ends, random.integers(self._ends[-1]), "right"))
        there = int(self.spoken.counts[item])
        count = min(there, self.frames)
        found = self.spoken.piece(item, int(random.integers(there - count + 1)), count, "mel", "wave", "f0")
        rest = self.frames - count
        hop = self.spoken.hop
        return {
            "mel": np.pad(found["mel"], ((0, rest), (0, 0)), constant_values=SILENCE),
            "wave": np.pad(found["wave"], (0, rest * hop)),
            "f0": np.pad(found["f0"], (0, rest)),
        }


class DecoderBatches(StepBatches):
    """An iterator without end over this process's share of the batches: dictionaries of arrays [B, ...].

    Args:
        codes, frames: the length of a row, see `Rows`.
        process_index, process_count: this process gets rows process_index * share .. of each batch.
        workers: processes that read ahead; 0: threads of this one.

    Raises:
        MossError: a data set is missing, damaged or does not fit the model.
    """

    def __init__(
        self,
        mixture: Mixture,
        config: SpeechDecoderConfig,
        *,
        batch_size: int,
        codes: int | None = None,
        frames: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 0,
    ):
        import grain

        if batch_size % process_count:
            raise MossError(f"data: batch_size {batch_size} does not divide by the {process_count} processes")
        self.rows = [
            DecoderRows(folder, config, mixture.seed, index, codes, frames)
            for index, (_, folder, _) in enumerate(mixture.sources)
        ]
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([mixture.seed, batch_size, codes, frames]).encode())
        for rows, (name, _, weight) in zip(self.rows, mixture.sources, strict=True):
            digest.update(json.dumps([name, weight, rows.spoken.about], sort_keys=True).encode())
        mixed = grain.MapDataset.mix(
            [grain.MapDataset.source(rows) for rows in self.rows], [weight for *_, weight in mixture.sources]
        )
        shares = mixed.batch(batch_size // process_count, drop_remainder=True)
        super().__init__(
            shares[process_index::process_count],
            digest.hexdigest(),
            "data, seed, weights, lengths or batch size",
            workers,
        )

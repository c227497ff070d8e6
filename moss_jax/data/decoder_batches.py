"""Batches of recordings for the speech decoder's training, in an order that depends on (seed, step) alone.

Row b of the batch of step s is row s * batch_size + b of an endless sequence, read through Grain as the language
model's is. A flow gets whole recordings, shuffled anew each epoch and cut at random where they are too long; a vocoder
gets random cuts, in which every frame is equally likely.
"""

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.data.batches import StepBatches
from moss_jax.data.decoder_data import DecoderDataset
from moss_jax.data.pipeline import CACHED_EPOCHS, Mixture
from moss_jax.errors import MossError
from moss_jax.speech_decoder.config import SpeechDecoderConfig

SILENCE = float(np.log(1e-5))  # the mel's floor, for frames after the end of a recording


class _DecoderRows:
    """The endless rows of one source. May be pickled; private fields are made again then.

    Args:
        seed, index: of the mixture, and the position of the source in it.
    """

    def __init__(self, folder: str | Path, config: SpeechDecoderConfig, seed: int, index: int, *, codes: bool):
        self.dataset = DecoderDataset(folder, config, codes)
        self.config = config
        self.seed = seed
        self.index = index
        self._initialize()

    def _initialize(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._initialize()

    def __len__(self) -> int:
        return sys.maxsize // 2**20  # endless; small enough for the arithmetic of a mixture

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.dataset.folder)!r})"

    def _random(self, row: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.index, row])


class FlowRows(_DecoderRows):
    """Rows of whole recordings, padded or cut to `codes` codes (N, with F mel frames each).

    A row has codes int32 [N], count int32 [] (codes that are not padding), mel float32 [N * F, M] and embedding
    float32 [E].
    """

    def __init__(self, folder: str | Path, config: SpeechDecoderConfig, seed: int, index: int, codes: int):
        super().__init__(folder, config, seed, index, codes=True)
        self.codes = codes

    def _initialize(self) -> None:
        self._lock = threading.Lock()
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                shuffle = np.random.default_rng([self.seed, self.index, epoch, 1])
                self._orders[epoch] = shuffle.permutation(len(self.dataset))
                while len(self._orders) > CACHED_EPOCHS:
                    self._orders.popitem(last=False)
            return self._orders[epoch]

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        size = self.config.flow.frames_per_code
        epoch, position = divmod(row, len(self.dataset))
        recording = int(self._order(epoch)[position])
        available = int(self.dataset.counts[recording]) // size
        count = min(available, self.codes)
        first = int(self._random(row).integers(available - count + 1))
        names = ["codes", "mel"]
        if self.dataset.has_embeddings:
            names.append("embedding")
        piece = self.dataset.piece(recording, first * size, count * size, *names)
        return {
            "codes": np.pad(piece["codes"], (0, self.codes - count)),
            "count": np.array(count, np.int32),
            "mel": np.pad(piece["mel"], ((0, (self.codes - count) * size), (0, 0))),
            "embedding": piece.get("embedding", np.zeros(self.config.flow.speaker_size, np.float32)),
        }


class VocoderRows(_DecoderRows):
    """Rows of random cuts of `frames` mel frames (T), silent after the end of a recording that is shorter.

    A row has mel float32 [T, M], wave float32 [hop * T] and f0 float32 [T].
    """

    def __init__(self, folder: str | Path, config: SpeechDecoderConfig, seed: int, index: int, frames: int):
        super().__init__(folder, config, seed, index, codes=False)
        self.frames = frames

    def _initialize(self) -> None:
        self._ends = np.cumsum(self.dataset.counts, dtype=np.int64)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        random = self._random(row)
        # A frame is drawn, so that a recording is chosen in proportion to its length.
        recording = int(np.searchsorted(self._ends, random.integers(self._ends[-1]), "right"))
        available = int(self.dataset.counts[recording])
        count = min(available, self.frames)
        first = int(random.integers(available - count + 1))
        piece = self.dataset.piece(recording, first, count, "mel", "wave", "f0")
        padding = self.frames - count
        return {
            "mel": np.pad(piece["mel"], ((0, padding), (0, 0)), constant_values=SILENCE),
            "wave": np.pad(piece["wave"], (0, padding * self.dataset.hop)),
            "f0": np.pad(piece["f0"], (0, padding)),
        }


class DecoderBatches(StepBatches):
    """An endless iterator over this process's share of the batches: dictionaries of arrays [B, ...].

    Args:
        codes: length of a row for a flow (`FlowRows`); None: rows are for a vocoder.
        frames: length of a row for a vocoder (`VocoderRows`).
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
            raise MossError(f"data: batch_size {batch_size} is not a multiple of the {process_count} processes")
        self.rows: list[FlowRows] | list[VocoderRows]
        folders = [folder for _, folder, _ in mixture.sources]
        if codes is not None:
            self.rows = [FlowRows(folder, config, mixture.seed, i, codes) for i, folder in enumerate(folders)]
        else:
            self.rows = [VocoderRows(folder, config, mixture.seed, i, frames) for i, folder in enumerate(folders)]
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([mixture.seed, batch_size, codes, frames]).encode())
        for rows, (name, _, weight) in zip(self.rows, mixture.sources, strict=True):
            digest.update(json.dumps([name, weight, rows.dataset.about], sort_keys=True).encode())
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

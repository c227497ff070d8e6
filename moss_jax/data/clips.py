"""Recordings with their transcripts as batches of static shapes, in an order that depends on (seed, step) alone.

A clip belongs to the shortest bucket that is long enough. In every epoch the clips of each bucket are shuffled and
divided into batches, and the batches are shuffled. An incomplete batch is filled up with other clips of weight 0, so
that an epoch has every clip once. Training can continue from any step, and a process reads only its share of a batch.
"""

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.audio import resample
from moss_jax.audio.decode import audio_length
from moss_jax.data.batches import StepBatches
from moss_jax.data.build import read_sound
from moss_jax.data.manifest import Document, Manifest, TarMember
from moss_jax.data.pipeline import CACHED_EPOCHS
from moss_jax.errors import MossError

Labels = Callable[[str], Sequence[int]]
LABELS_UNIT = 8  # the labels of a bucket are padded to a multiple of this


class Clips:
    """The recordings of some manifests with their lengths, buckets and transcripts.

    Args:
        manifests: of the format "asr" (audio and text).
        rate: Hz, of the waves that are returned.
        buckets: seconds, ascending: the lengths that clips are padded to. Longer recordings are skipped.
        unit: samples; the length of a bucket is rounded up to a multiple of this.

    Attributes:
        texts: the transcript of each clip.
        samples: int64 [clips], the length of each at `rate`.
        bucket: int64 [clips], the index of its bucket.
        sizes: samples of each bucket.
        skipped: number of recordings that were longer than the last bucket.

    Raises:
        MossError: a manifest is bad, a recording cannot be read, or no recording is short enough.
    """

    def __init__(self, manifests: Sequence[str | Path], rate: int, buckets: Sequence[float], unit: int = 1):
        if not buckets or list(buckets) != sorted(buckets) or buckets[0] <= 0:
            raise MossError(f"buckets are {tuple(buckets)}, expected seconds > 0 in ascending order")
        if not manifests:
            raise MossError("clips: no manifest, expected at least one")
        self.rate = rate
        self.sizes = [-(-round(seconds * rate) // unit) * unit for seconds in buckets]
        documents = [document for path in manifests for document in Manifest(path, "asr").documents()]
        samples = np.array([_samples(document, rate) for document in documents], np.int64)
        kept = np.flatnonzero(samples <= self.sizes[-1])
        self.skipped = len(documents) - len(kept)
        if not len(kept):
            raise MossError(f"{manifests[0]}: no recording of {buckets[-1]:g} s or less, expected at least one")
        self.texts = [documents[i].text or "" for i in kept]
        self.samples = samples[kept]
        self._recordings = [_recording(documents[i]) for i in kept]
        self.bucket = np.searchsorted(self.sizes, self.samples)
        digest = hashlib.blake2b(json.dumps([rate, self.sizes]).encode(), digest_size=16)
        for i in kept:
            digest.update(documents[i].digest.encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def wave(self, index: int) -> np.ndarray:
        """float32 [samples]. Raises MossError when the recording cannot be read any more."""
        recording = read_sound(self._recordings[index])
        return resample(recording.wave, recording.rate, self.rate)[: self.sizes[self.bucket[index]]]


class ClipOrder:
    """Which clips the batch of a step has. May be pickled.

    Attributes:
        per_epoch: batches per epoch.
    """

    def __init__(self, bucket: np.ndarray, batch_size: int, seed: int):
        self._bucket = bucket
        self._size = batch_size
        self._seed = seed
        self._initialize()
        self.per_epoch = sum(-(-count // batch_size) for count in np.bincount(bucket))

    def _initialize(self) -> None:
        self._lock = threading.Lock()
        self._epochs: OrderedDict[int, list[tuple[np.ndarray, np.ndarray]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_epochs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._initialize()

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(clips int [B], weights float32 [B]) of a step; the weight is 0 where a batch was filled up."""
        epoch, position = divmod(step, self.per_epoch)
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = self._shuffle(np.random.default_rng([self._seed, epoch]))
                while len(self._epochs) > CACHED_EPOCHS:
                    self._epochs.popitem(last=False)
            return self._epochs[epoch][position]

    def _shuffle(self, random: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        batches = []
        for bucket in np.unique(self._bucket):
            clips = random.permutation(np.flatnonzero(self._bucket == bucket))
            for start in range(0, len(clips), self._size):
                part = clips[start : start + self._size]
                filled = np.concatenate([part, np.resize(clips, self._size - len(part))])
                batches.append((filled, (np.arange(self._size) < len(part)).astype(np.float32)))
        return [batches[i] for i in random.permutation(len(batches))]


class _BatchShares:
    """Share `index` of `count` of each batch, by step: the sequence that Grain reads."""

    def __init__(
        self,
        clips: Clips,
        order: ClipOrder,
        labels: list[np.ndarray],
        label_sizes: list[int],
        index: int,
        count: int,
    ):
        self.clips = clips
        self.order = order
        self.labels = labels
        self.label_sizes = label_sizes
        self.index = index
        self.count = count

    def __len__(self) -> int:
        return sys.maxsize // 2**20  # endless

    def __repr__(self) -> str:
        return f"clips {self.clips.fingerprint}, share {self.index} of {self.count}"

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        members, weights = self.order.batch(step)
        bucket = self.clips.bucket[members[0]]
        share = len(members) // self.count
        mine = slice(self.index * share, (self.index + 1) * share)
        members = members[mine]
        weights = weights[mine]
        wave = np.zeros((share, self.clips.sizes[bucket]), np.float32)
        labels = np.zeros((share, self.label_sizes[bucket]), np.int32)
        samples = np.zeros(share, np.int32)
        counts = np.zeros(share, np.int32)
        for row, member in enumerate(members):
            clip = self.clips.wave(member)
            wave[row, : len(clip)] = clip
            samples[row] = len(clip)
            clip_labels = self.labels[member]
            labels[row, : len(clip_labels)] = clip_labels
            counts[row] = len(clip_labels)
        return {
            "wave": wave,
            "samples": samples,
            "labels": labels,
            "label_count": counts,
            "weight": weights,
            "clip": members.astype(np.int32),
        }


class ClipBatches(StepBatches):
    """An endless iterator over a share of the global batches.

    A batch is a dictionary: wave float32 [B, samples], padded with 0; samples int32 [B]; labels int32 [B, labels],
    padded with 0; label_count int32 [B]; weight float32 [B]; clip int32 [B], the indices in `clips`. The padded sizes
    are those of the bucket.

    Args:
        labels: transcript -> ids of its labels.
        batch_size: B of the global batch.
        index, count: which share of each batch, out of how many.
        workers: processes that read ahead; 0: threads of this process.

    Attributes:
        per_epoch: batches per epoch.
        max_labels: the most labels of one clip.
        step: of the next batch, from 0.
    """

    def __init__(
        self, clips: Clips, labels: Labels, batch_size: int, seed: int, index: int = 0, count: int = 1, workers: int = 0
    ):
        import grain

        clip_labels = [np.asarray(labels(text), np.int32) for text in clips.texts]
        label_sizes = []
        for bucket in range(len(clips.sizes)):
            longest = max([1, *(len(clip_labels[i]) for i in np.flatnonzero(clips.bucket == bucket))])
            label_sizes.append(-(-longest // LABELS_UNIT) * LABELS_UNIT)
        order = ClipOrder(clips.bucket, batch_size, seed)
        self.max_labels = max(map(len, clip_labels))
        self.per_epoch = order.per_epoch
        super().__init__(
            grain.MapDataset.source(_BatchShares(clips, order, clip_labels, label_sizes, index, count)),
            f"{clips.fingerprint} {seed} {batch_size}",
            "data, seed, buckets or batch size",
            workers,
        )


def _recording(document: Document) -> Path | TarMember:
    sound = document.sounds[0]
    if sound is None or isinstance(sound, np.ndarray):
        raise MossError(f"line {document.line}: has codes and no audio, expected a recording")
    return sound


def _samples(document: Document, rate: int) -> int:
    """The length of a recording at `rate`; of a file it is read from the header."""
    sound = _recording(document)
    if isinstance(sound, TarMember):
        recording = read_sound(sound)
        return int(np.ceil(len(recording.wave) * rate / recording.rate))
    import soundfile

    try:
        header = soundfile.info(sound)
        # The length of an MP3 file may be an estimate, that of a FLAC file may be unknown (2**63 - 1).
        if header.format != "MP3" and header.frames < 2**40:
            return int(np.ceil(header.frames * rate / header.samplerate))
    except soundfile.LibsndfileError:
        pass  # not a format of libsndfile: m4a, webm
    count, file_rate = audio_length(sound)
    return int(np.ceil(count * rate / file_rate))

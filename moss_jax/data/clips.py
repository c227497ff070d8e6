"""Recordings with their transcripts as batches of static shapes, in an order that depends on (seed, step) alone.

A clip belongs to the shortest bucket that holds it. Every epoch the clips of each bucket are shuffled and cut into
batches, and the batches are shuffled; what does not fill a batch is filled up with other clips of weight 0, so that an
epoch holds every clip once. Any step can be the next one, and a process reads only its part of a batch.
"""

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moss_jax.audio import resample
from moss_jax.audio.decode import audio_length
from moss_jax.data.batches import StepBatches
from moss_jax.data.build import read_sound
from moss_jax.data.manifest import Document, Manifest, TarMember
from moss_jax.data.pipeline import CACHED_EPOCHS
from moss_jax.errors import MossError

Labels = Callable[[str], Sequence[int]]
LABELS_UNIT = 8  # the labels of a bucket are padded to a multiple of it


class Clips:
    """The recordings of some manifests, looked at once: how long each is, in which bucket, and what is said in it.

    Args:
        manifests: with the format "asr" (audio and text).
        rate: Hz, of the waves that come out.
        buckets: seconds, ascending: lengths that clips are padded to. Longer ones are left out.
        unit: samples; a bucket is a multiple of it.

    Attributes:
        texts: the transcript of each clip.
        samples: int [N], how long each is at `rate`.
        bucket: int [N], the place of its bucket.
        sizes: samples of each bucket.
        left_out: how many recordings were longer than the last bucket.

    Raises:
        MossError: a manifest is bad, a recording cannot be read, or none is short enough.
    """

    def __init__(self, manifests: Sequence[str | Path], rate: int, buckets: Sequence[float], unit: int = 1):
        if not buckets or list(buckets) != sorted(buckets) or buckets[0] <= 0:
            raise MossError(f"buckets are {tuple(buckets)}, expected seconds above 0, ascending")
        if not manifests:
            raise MossError("clips: no manifest, expected one at least")
        self.rate = rate
        self.sizes = [-(-round(seconds * rate) // unit) * unit for seconds in buckets]
        documents = [document for path in manifests for document in Manifest(path, "asr").documents()]
        samples = np.array([_samples(document, rate) for document in documents], np.int64)
        kept = np.flatnonzero(samples <= self.sizes[-1])
        self.skipped = len(documents) - len(kept)
        if not len(kept):
            raise MossError(f"{manifests[0]}: no recording of {buckets[-1]:g} s or less, expected one at least")
        self.texts = [documents[i].text for i in kept]
        self.samples = samples[kept]
        self._sounds = [documents[i].sounds[0] for i in kept]
        self.bucket = np.searchsorted(self.sizes, self.samples)
        digest = hashlib.blake2b(json.dumps([rate, self.sizes]).encode(), digest_size=16)
        for i in kept:
            digest.update(documents[i].digest.encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def wave(self, index: int) -> np.ndarray:
        """float32 [samples]. Raises MossError when the recording cannot be read any more."""
        read = read_sound(self._sounds[index])
        return resample(read.wave, read.rate, self.rate)[: self.sizes[self.bucket[index]]]


class ClipOrder:
    """Which clips the batch of a step holds."""

    def __init__(self, bucket: np.ndarray, batch_size: int, seed: int):
        self._bucket = bucket
        self._size = batch_size
        self._seed = seed
        self._begin()
        self.per_epoch = sum(-(-count // batch_size) for count in np.bincount(bucket))

    def _begin(self):
        self._lock = threading.Lock()
        self._plans = OrderedDict()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_plans")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(clips int [B], weights float32 [B]) of step 0, 1, ...; weight 0 where a batch was filled up."""
        epoch, place = divmod(step, self.per_epoch)
        with self._lock:
            if epoch not in self._plans:
                self._plans[epoch] = self._plan(np.random.default_rng([self._seed, epoch]))
                while len(self._plans) > CACHED_EPOCHS:
                    self._plans.popitem(last=False)
            return self._plans[epoch][place]

    def _plan(self, random: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        batches = []
        for bucket in np.unique(self._bucket):
            clips = random.permutation(np.flatnonzero(self._bucket == bucket))
            for start in range(0, len(clips), self._size):
                part = clips[start : start + self._size]
                filled = np.concatenate([part, np.resize(clips, self._size - len(part))])
                batches.append((filled, (np.arange(self._size) < len(part)).astype(np.float32)))
        return [batches[i] for i in random.permutation(len(batches))]


class _Part:
    """One of `count` equal parts of each batch, by step: what Grain reads from."""

    def __init__(self, clips: Clips, order: ClipOrder, labels: list[np.ndarray], widths: list[int], index, count):
        self.clips = clips
        self.order = order
        self.labels = labels
        self.widths = widths
        self.index = index
        self.count = count

    def __len__(self) -> int:
        return sys.maxsize // 2**20

    def __repr__(self) -> str:
        return f"clips {self.clips.fingerprint}, part {self.index} of {self.count}"

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        members, weights = self.order.batch(step)
        bucket = self.clips.bucket[members[0]]
        share = len(members) // self.count
        mine = slice(self.index * share, (self.index + 1) * share)
        members = members[mine]
        weights = weights[mine]
        wave = np.zeros((share, self.clips.sizes[bucket]), np.float32)
        labels = np.zeros((share, self.widths[bucket]), np.int32)
        samples = np.zeros(share, np.int32)
        counts = np.zeros(share, np.int32)
        for row, member in enumerate(members):
            sound = self.clips.wave(member)
            wave[row, : len(sound)] = sound
            samples[row] = len(sound)
            said = self.labels[member]
            labels[row, : len(said)] = said
            counts[row] = len(said)
        return {
            "wave": wave,
            "samples": samples,
            "labels": labels,
            "label_count": counts,
            "weight": weights,
            "clip": members.astype(np.int32),
        }


class ClipBatches(StepBatches):
    """An iterator without end over a part of the global batches.

    A batch is a dictionary: wave float32 [B, L], zero-padded; samples int32 [B]; labels int32 [B, N], padded with 0;
    label_count int32 [B]; weight float32 [B]; clip int32 [B], the places in `clips`. L and N are those of the bucket.

    Attributes:
        per_epoch: batches in which every clip is once.
        most_labels: of one clip.
        step: of the batch that comes next, from 0.
    """

    def __init__(
        self, clips: Clips, labels: Labels, batch_size: int, seed: int, index: int = 0, count: int = 1, workers: int = 0
    ):
        import grain

        numbers = [np.asarray(labels(text), np.int32) for text in clips.texts]
        widths = [
            -(-max([1, *(len(numbers[i]) for i in np.flatnonzero(clips.bucket == bucket))]) // LABELS_UNIT)
            * LABELS_UNIT
            for bucket in range(len(clips.sizes))
        ]
        order = ClipOrder(clips.bucket, batch_size, seed)
        self.max_labels = max(map(len, numbers))
        self.per_epoch = order.per_epoch
        super().__init__(
            grain.MapDataset.source(_Part(clips, order, numbers, widths, index, count)),
            f"{clips.fingerprint} {seed} {batch_size}",
            "data, seed, buckets or batch size",
            workers,
        )


def _samples(document: Document, rate: int) -> int:
    """How long a recording is at `rate`, from its header where it is a file."""
    sound = document.sounds[0]
    if isinstance(sound, np.ndarray):
        raise MossError(f"line {document.line}: has codes and no audio, expected a recording")
    if not isinstance(sound, TarMember):
        import soundfile

        try:
            about = soundfile.info(sound)
            # The length of an MP3 file may be an estimate, that of a FLAC file may be unknown (2**63 - 1).
            if about.format != "MP3" and about.frames < 2**40:
                return int(np.ceil(about.frames * rate / about.samplerate))
        except soundfile.LibsndfileError:
            pass  # it may be m4a
        count, own = audio_length(sound)
        return int(np.ceil(count * rate / own))
    read = read_sound(sound)
    return int(np.ceil(len(read.wave) * rate / read.rate))

"""A manifest into recordings to train a speech decoder on: codes, mel, wave and F0 of each, aligned frame by frame.

    FOLDER/source.json             what it holds: counts, sizes, the mel's mean
           shard-00000/            counts.npy int32 [documents], in mel frames, and one after the other
                                   codes.npy int32, mel.npy float32 [frames, M], wave.npy int16, f0.npy float32 (Hz)
                                   and, where the system has a speaker network, embedding.npy float32 [documents, E]

What is done lies in FOLDER.part, whole shards; the same command goes on there after it was killed. Where the system has
no speech tokenizer there are no codes, and the data set serves the vocoder alone.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.audio import MAX_BYTES, from_pcm16, resample, to_pcm16
from moss_jax.checkpoint import atomic_folder, write_text
from moss_jax.checkpoint.config_io import read_config
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.data.manifest import Document, Manifest, Member, bad_lines
from moss_jax.data.tokenize import READERS, read_speech
from moss_jax.dialogue.voice import log_mel
from moss_jax.documents import read_json, shown
from moss_jax.errors import MossError
from moss_jax.files import output_lock
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.speaker import speaker_embedding
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER

FORMAT = "moss-jax-spoken-1"
SOURCE = "source.json"
SETTINGS = "settings.json"
MANIFEST_FORMAT = "decoder"
F0_RANGE = (50.0, 600.0)  # Hz, in which voices are looked for
GROUP = 16  # documents that are encoded together
ARRAYS = ("codes", "mel", "wave", "f0", "counts", "embedding")
Say = Callable[[str], None]


@dataclass(frozen=True)
class SpokenRequest:
    """What is asked for: of the documents' recordings, and of conversations the assistant's turns.

    Attributes:
        manifest: JSON lines; a system folder `model`, of which the speech tokenizer and the speech decoder's sizes and
            speaker network are used as far as they are there; `out`, the data set's folder.
        shard_documents: documents in a shard.
        max_audio_bytes: the most decoded samples of one recording (`moss_jax.audio.read_audio`).
    """

    manifest: Path
    model: Path
    out: Path
    shard_documents: int = 512
    max_audio_bytes: int = MAX_BYTES


def make_spoken(request: SpokenRequest, say: Say = lambda line: None) -> dict[str, Any]:
    """Makes the data set; returns what source.json says.

    Raises:
        MossError: bad lines (all of them, by number), a model that does not fit, a FOLDER of something else, no
            librosa, or a place that cannot be written.
    """
    if request.shard_documents < 1:
        raise MossError(f"shard_documents is {request.shard_documents}, expected 1 at least")
    return _Work(request, say).run()


def pitch(wave: np.ndarray, rate: int, hop: int) -> np.ndarray:
    """F0 in Hz of the mel's frames, by librosa's pYIN: float32 [L] -> float32 [L // hop], 0 where there is no voice."""
    try:
        import librosa
    except ImportError as error:
        raise MossError("F0: needs the package librosa, pip install 'moss-jax[train]'") from error
    padding = (4 * hop - hop) // 2  # frames as those of the mel
    padded = np.pad(wave, padding, mode="reflect")
    low, high = F0_RANGE
    f0, *_ = librosa.pyin(  # steps of 0.2 semitones take half the time of 0.1
        padded,
        fmin=low,
        fmax=high,
        sr=rate,
        frame_length=4 * hop,
        hop_length=hop,
        center=False,
        fill_na=0.0,
        resolution=0.2,
    )
    return f0[: len(wave) // hop].astype(np.float32)


class _Work:
    def __init__(self, request: SpokenRequest, say: Say):
        self.request = request
        self.say = say
        self.folder = SystemFolder(request.model)
        has = {
            component_folder: (self.folder.path / component_folder / "config.json").is_file()
            for component_folder in ("speech_tokenizer", "speech_decoder")
        }
        self.ear = self.folder.config(SPEECH_TOKENIZER) if has["speech_tokenizer"] else None
        self.sizes = self.folder.config(SPEECH_DECODER) if has["speech_decoder"] else SpeechDecoderConfig()
        if self.ear is not None and self.ear.code_rate != self.sizes.code_rate:
            raise MossError(
                f"{self.folder.path}: the speech tokenizer has {self.ear.code_rate} codes a second, the speech decoder "
                f"{self.sizes.code_rate}"
            )
        speaker = self.folder.path / "speech_decoder" / "speaker.safetensors"
        self.enrols = has["speech_decoder"] and self.sizes.speaker is not None and speaker.is_file()
        self.manifest = Manifest(request.manifest, MANIFEST_FORMAT)
        self.shards = -(-len(self.manifest) // request.shard_documents)
        self.part = request.out.with_name(request.out.name + ".part")
        self.about = {
            "format": FORMAT,
            "manifest": self.manifest.fingerprint(0, len(self.manifest)),
            "codes": self.ear.quantize_vocab_size if self.ear else None,
            "speech_tokenizer": self._digests() if self.ear else None,
            "mel_bins": self.sizes.flow.mel_bins,
            "hop": self.sizes.vocoder.hop,
            "sample_rate": self.sizes.sample_rate,
            "frames_per_code": self.sizes.flow.frames_per_code,
            "embedding": self.sizes.flow.speaker_size if self.enrols else None,
            "shard_documents": request.shard_documents,
        }
        self.problems: list[tuple[int, str]] = []

    def _digests(self) -> list[str]:
        component_folder = self.folder.component_folder("speech_tokenizer")
        found = []
        for path in sorted(component_folder.iterdir()):
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest())
        return found

    @cached_property
    def speech_tokenizer(self):
        from moss_jax.speech_tokenizer.encode import SpeechTokenizer

        return SpeechTokenizer.load(self.folder.component_folder("speech_tokenizer"))

    @cached_property
    def speaker_params(self):
        return self.folder.load(SPEECH_DECODER)[1]["speaker"]

    def run(self) -> dict[str, Any]:
        with output_lock(self.request.out):
            return self._run_locked()

    def _run_locked(self) -> dict[str, Any]:
        out = self.request.out
        if (out / SOURCE).is_file():
            found = read_json(out / SOURCE)
            if {key: found.get(key) for key in self.about} != self.about:
                raise MossError(f"{out}: already there, of another manifest, model or settings; choose another folder")
            self.say(f"{out} is there already")
            return found
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise MossError(f"{out}: already there and no data set; choose another folder")
        self._begin_part()
        with ThreadPoolExecutor(READERS) as pool:
            for index in range(self.shards):
                if not (self.part / f"shard-{index:05d}").is_dir():
                    self._make_shard(index, pool)
        if self.problems:
            raise bad_lines(self.manifest.path, self.problems, len(self.manifest))
        about = self.about | self._totals()
        write_text(self.part / SOURCE, json.dumps(about, indent=1) + "\n")
        (self.part / SETTINGS).unlink()
        if out.exists():
            out.rmdir()  # it is empty
        os.replace(self.part, out)
        return about

    def _begin_part(self) -> None:
        try:
            self.part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MossError(f"{self.part}: cannot be made ({error.strerror}); choose a writable place") from error
        for left in self.part.glob(".shard-*"):
            shutil.rmtree(left, ignore_errors=True)
        settings = self.part / SETTINGS
        if not settings.exists():
            write_text(settings, json.dumps(self.about, indent=1) + "\n")
        if read_json(settings) != self.about:
            raise MossError(
                f"{self.part}: begun with another manifest, model or settings; repeat those, or remove it to begin anew"
            )

    def _make_shard(self, index: int, pool: ThreadPoolExecutor) -> None:
        start = index * self.request.shard_documents
        stop = min(start + self.request.shard_documents, len(self.manifest))
        found = []
        known = len(self.problems)
        for group in _grouped(self.manifest.documents(start, stop)):
            found += self._group(group, pool)
            self.say(f"{min(start + len(found), stop)} of {len(self.manifest)} documents")
        if len(self.problems) > known:
            return
        with atomic_folder(self.part / f"shard-{index:05d}") as folder:
            np.save(folder / "counts.npy", np.array([len(item["f0"]) for item in found], np.int32))
            for name in ("codes", "mel", "wave", "f0", "embedding"):
                parts = [item[name] for item in found if name in item]
                if parts:
                    np.save(folder / f"{name}.npy", np.stack(parts) if name == "embedding" else np.concatenate(parts))

    def _group(self, documents: list[Document], pool: ThreadPoolExecutor) -> list[dict[str, np.ndarray]]:
        """Of each recording codes, mel, wave, F0."""
        sounds = [(document, sound) for document in documents for sound in _sounds(document)]
        for document in documents:
            if not document.turns and not _sounds(document):
                self.problems.append((document.line, "has no recording, expected audio"))
        waves = []
        limit = self.request.max_audio_bytes
        readings = pool.map(lambda sound: read_speech(sound, limit), [sound for _, sound in sounds])
        for (document, _), read in zip(sounds, readings, strict=True):
            if isinstance(read, MossError):
                self.problems.append((document.line, str(read)))
            else:
                waves.append((read.wave, read.rate))
                for notice in read.notices:
                    self.say(f"note: line {document.line}: {notice}")
        if not waves or self.problems:
            return []
        sizes = self.sizes
        per_code = self.sizes.samples_per_code
        found = []
        for wave, rate in waves:
            x = resample(wave, rate, sizes.sample_rate)
            x = np.pad(x, (0, max(-len(x) % per_code, per_code - len(x))))
            found.append({"wave": to_pcm16(x)})
        exact = [from_pcm16(item["wave"]) for item in found]
        hop = sizes.vocoder.hop
        f0 = pool.map(lambda x: pitch(x, sizes.sample_rate, hop), exact)
        for item, x in zip(found, exact, strict=True):
            item["mel"] = log_mel(x, sizes)
            if self.enrols:
                speech = resample(x, sizes.sample_rate, 16000)
                item["embedding"] = np.asarray(speaker_embedding(sizes.speaker, self.speaker_params, speech))
        for item, values in zip(found, f0, strict=True):
            item["f0"] = values
        if self.ear is not None:
            codes = self.speech_tokenizer.encode([resample(wave, rate, self.ear.sample_rate) for wave, rate in waves])
            for item, said in zip(found, codes, strict=True):
                item["codes"] = said.astype(np.int32)
                count = min(len(said), len(item["f0"]) // sizes.flow.frames_per_code)
                _cut(item, count, sizes.flow.frames_per_code, hop)
        return found

    def _totals(self) -> dict[str, Any]:
        documents = frames = 0
        total = np.zeros(self.sizes.flow.mel_bins)
        squares = np.zeros(self.sizes.flow.mel_bins)
        for index in range(self.shards):
            if not (self.part / f"shard-{index:05d}" / "mel.npy").is_file():
                continue  # conversations without a spoken reply
            mel = np.load(self.part / f"shard-{index:05d}" / "mel.npy", mmap_mode="r")
            documents += len(np.load(self.part / f"shard-{index:05d}" / "counts.npy", mmap_mode="r"))
            frames += len(mel)
            total += mel.sum(0, dtype=np.float64)
            squares += np.square(mel, dtype=np.float64).sum(0)
        if not frames:
            raise MossError(f"{self.manifest.path}: no recording in it, expected some to train a speech decoder on")
        mean = total / frames
        deviation = np.sqrt(np.maximum(squares.mean() / frames - mean.mean() ** 2, 0))
        return {
            "documents": documents,
            "frames": frames,
            "mel_mean": mean.round(6).tolist(),
            "mel_deviation": round(float(deviation), 6),
        }


def _sounds(document: Document) -> list[Path | Member]:
    sounds = document.sounds
    if document.turns:
        sounds = [sound for sound, turn in zip(sounds, document.turns, strict=True) if turn.role == "assistant"]
    return [sound for sound in sounds if isinstance(sound, Path | Member)]


def _grouped(documents: Iterator[Document]) -> Iterator[list[Document]]:
    group = []
    for document in documents:
        group.append(document)
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group


def _cut(item: dict[str, np.ndarray], codes: int, frames_per_code: int, hop: int) -> None:
    frames = codes * frames_per_code
    item |= {"codes": item["codes"][:codes], "mel": item["mel"][:frames], "f0": item["f0"][:frames]}
    item["wave"] = item["wave"][: frames * hop]


@dataclass(frozen=True)
class _About:
    """The fields of a data set's description that a reader uses."""

    mel_bins: int
    hop: int
    sample_rate: int
    frames_per_code: int
    codes: int | None
    embedding: int | None
    documents: int


class Spoken:
    """A data set on disk; `spoken.item(i)` are memory-mapped pieces. May be sent to processes.

    Attributes:
        counts: int32 [documents], mel frames.

    Raises:
        MossError: there is no data set, it has no codes though `codes` asks for some, or it is of another mel.
    """

    def __init__(self, folder: str | Path, config: SpeechDecoderConfig, codes: bool):
        self.folder = Path(folder)
        if not (self.folder / SOURCE).is_file():
            raise MossError(f"{folder}: no {SOURCE} in it, expected a data set (moss-jax tokenize --format decoder)")
        self.about = read_json(self.folder / SOURCE)
        if self.about.get("format") != FORMAT:
            raise MossError(f"{folder}: format is {shown(self.about.get('format'))}, expected {FORMAT!r}")
        read_config(_About, self.about, self.folder / SOURCE, foreign=True)
        wanted = {
            "mel_bins": config.flow.mel_bins,
            "hop": config.vocoder.hop,
            "sample_rate": config.sample_rate,
            "frames_per_code": config.flow.frames_per_code,
        }
        for name, value in wanted.items():
            if self.about[name] != value:
                raise MossError(f"{folder}: {name} is {self.about[name]}, the model's is {value}")
        if codes and self.about["codes"] is None:
            raise MossError(f"{folder}: made without a speech tokenizer, so that there are no codes to train a flow on")
        if codes and self.about["codes"] > config.flow.codebook_size:
            raise MossError(
                f"{folder}: of a speech tokenizer with {self.about['codes']} codes, the flow has "
                f"{config.flow.codebook_size} (codebook_size)"
            )
        if codes and self.about["embedding"] not in (None, config.flow.speaker_size):
            raise MossError(
                f"{folder}: speaker embeddings of {self.about['embedding']}, the flow's speaker_size is "
                f"{config.flow.speaker_size}"
            )
        self.hop = config.vocoder.hop
        self.frames_per_code = config.flow.frames_per_code
        self._open()

    def _open(self) -> None:
        shards = sorted(self.folder.glob("shard-*"))
        self._arrays = [
            {name: np.load(path, mmap_mode="r") for name in ARRAYS if (path := shard / f"{name}.npy").is_file()}
            for shard in shards
        ]
        self.counts = np.concatenate([arrays["counts"] for arrays in self._arrays])
        if len(self.counts) != self.about["documents"]:
            raise MossError(
                f"{self.folder}: damaged, {len(self.counts)} recordings of the {self.about['documents']} promised"
            )
        self._shard = np.repeat(np.arange(len(shards)), [len(arrays["counts"]) for arrays in self._arrays])
        starts = [np.cumsum([0, *arrays["counts"]])[:-1] for arrays in self._arrays]
        self._starts = np.concatenate(starts)
        self._places = np.concatenate([np.arange(len(start)) for start in starts])

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_") and name != "counts"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.counts)

    def piece(self, index: int, first: int, frames: int, *names: str) -> dict[str, np.ndarray]:
        """Frames first .. first + frames - 1 of a recording: of `mel` [T, M], `wave` float32 [hop * T], `f0` [T],
        `codes` (both numbers multiples of frames_per_code), and its `embedding` [E]."""
        arrays = self._arrays[self._shard[index]]
        start = int(self._starts[index]) + first
        found = {}
        for name in names:
            if name == "wave":
                part = arrays["wave"][start * self.hop : (start + frames) * self.hop]
                found[name] = from_pcm16(part)
            elif name == "codes":
                size = self.frames_per_code
                found[name] = np.asarray(arrays["codes"][start // size : (start + frames) // size])
            elif name == "embedding":
                found[name] = np.asarray(arrays["embedding"][self._places[index]])
            else:
                found[name] = np.asarray(arrays[name][start : start + frames])
        return found

    @property
    def has_embeddings(self) -> bool:
        return self.about["embedding"] is not None

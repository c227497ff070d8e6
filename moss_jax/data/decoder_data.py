"""Data sets that a speech decoder is trained on: codes, mel, waveform and F0 of recordings, aligned frame by frame.

    FOLDER/source.json             counts, sizes, the mel's mean and standard deviation
           shard-00000/            counts.npy int32 [documents], in mel frames; then, one recording after another,
                                   codes.npy int32, mel.npy float32 [frames, M], wave.npy int16, f0.npy float32 (Hz),
                                   and, if the system has a speaker network, embedding.npy float32 [documents, E]

If the system has no speech tokenizer there are no codes, and the data set can train a vocoder only. An interrupted
build is resumed by the same command (`moss_jax.data.build`).
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moss_jax.audio import MAX_BYTES, from_pcm16, resample, to_pcm16
from moss_jax.checkpoint.config_io import read_config
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.data.build import DatasetBuild, ReadSound, folder_digests
from moss_jax.data.manifest import Document, Manifest, TarMember
from moss_jax.data.store import SOURCE_FILE
from moss_jax.dialogue.voice import log_mel
from moss_jax.documents import read_json, shown
from moss_jax.errors import MossError
from moss_jax.files import atomic_folder, write_text
from moss_jax.progress import Say, silent
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.speaker import speaker_embedding
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER

if TYPE_CHECKING:
    from moss_jax.speech_tokenizer.encode import SpeechTokenizer

DECODER_DATA_FORMAT = "moss-jax-spoken-1"
MANIFEST_FORMAT = "decoder"
F0_RANGE = (50.0, 600.0)  # Hz, the range of voices
SPEAKER_RATE = 16000  # Hz, of the speaker network's input
ARRAYS = ("codes", "mel", "wave", "f0", "counts", "embedding")


@dataclass(frozen=True)
class DecoderDataRequest:
    """What `build_decoder_data` makes: a data set of the documents' recordings; of conversations, the assistant's.

    Attributes:
        manifest: JSON lines.
        model: a system folder. Its speech tokenizer, the sizes of its speech decoder and its speaker network are used
            if they are there.
        out: the data set's folder.
        shard_documents: documents per shard.
        max_audio_bytes: the most decoded bytes of one recording (`moss_jax.audio.read_audio`).
    """

    manifest: Path
    model: Path
    out: Path
    shard_documents: int = 512
    max_audio_bytes: int = MAX_BYTES


def build_decoder_data(request: DecoderDataRequest, say: Say = silent) -> dict[str, Any]:
    """Makes the data set; returns the content of its source.json.

    Raises:
        MossError: bad lines (all of them, by number), a model that does not fit, OUT or OUT.part holding something
            else, librosa missing, or a folder that cannot be written.
    """
    if request.shard_documents < 1:
        raise MossError(f"shard_documents is {request.shard_documents}, expected at least 1")
    source = _DecoderDataBuild(request, say).build()
    assert source is not None  # it is None in other processes only
    return source


def estimate_f0(wave: np.ndarray, rate: int, hop: int) -> np.ndarray:
    """F0 of the mel's frames by librosa's pYIN.

    Args:
        wave: float32 [samples] at `rate` Hz.
        hop: samples per frame.

    Returns:
        float32 [samples // hop] in Hz, 0 in unvoiced frames.
    """
    try:
        import librosa
    except ImportError as error:
        raise MossError("F0: needs the package librosa, pip install 'moss-jax[train]'") from error
    padding = (4 * hop - hop) // 2  # so that frames have the same centres as those of the mel
    padded = np.pad(wave, padding, mode="reflect")
    low, high = F0_RANGE
    f0, *_ = librosa.pyin(
        padded,
        fmin=low,
        fmax=high,
        sr=rate,
        frame_length=4 * hop,
        hop_length=hop,
        center=False,
        fill_na=0.0,
        resolution=0.2,  # semitones; takes half the time of the default, 0.1
    )
    return f0[: len(wave) // hop].astype(np.float32)


class _DecoderDataBuild(DatasetBuild):
    def __init__(self, request: DecoderDataRequest, say: Say):
        self.folder = SystemFolder(request.model)
        has_tokenizer = self._has_component("speech_tokenizer")
        has_decoder = self._has_component("speech_decoder")
        self.tokenizer_config = self.folder.config(SPEECH_TOKENIZER) if has_tokenizer else None
        self.decoder_config = self.folder.config(SPEECH_DECODER) if has_decoder else SpeechDecoderConfig()
        if self.tokenizer_config is not None and self.tokenizer_config.code_rate != self.decoder_config.code_rate:
            raise MossError(
                f"{self.folder.path}: the speech tokenizer has {self.tokenizer_config.code_rate} codes per second, the "
                f"speech decoder {self.decoder_config.code_rate}"
            )
        speaker_weights = self.folder.path / "speech_decoder" / "speaker.safetensors"
        has_speaker = has_decoder and speaker_weights.is_file()
        self.speaker_config = self.decoder_config.speaker if has_speaker else None
        manifest = Manifest(request.manifest, MANIFEST_FORMAT)
        flow = self.decoder_config.flow
        tokenizer = self.tokenizer_config
        settings = {
            "format": DECODER_DATA_FORMAT,
            "manifest": manifest.fingerprint(0, len(manifest)),
            "codes": tokenizer.quantize_vocab_size if tokenizer else None,
            "speech_tokenizer": folder_digests(self.folder.component_folder("speech_tokenizer")) if tokenizer else None,
            "mel_bins": flow.mel_bins,
            "hop": self.decoder_config.vocoder.hop,
            "sample_rate": self.decoder_config.sample_rate,
            "frames_per_code": flow.frames_per_code,
            "embedding": flow.speaker_size if self.speaker_config is not None else None,
            "shard_documents": request.shard_documents,
        }
        super().__init__(
            manifest,
            request.out,
            settings,
            settings,
            say,
            shard_documents=request.shard_documents,
            max_audio_bytes=request.max_audio_bytes,
        )

    def _has_component(self, name: str) -> bool:
        return (self.folder.path / name / "config.json").is_file()

    @cached_property
    def speech_tokenizer(self) -> "SpeechTokenizer":
        from moss_jax.speech_tokenizer.encode import SpeechTokenizer

        return SpeechTokenizer.load(self.folder.component_folder("speech_tokenizer"))

    @cached_property
    def speaker_params(self) -> Any:
        return self.folder.load(SPEECH_DECODER)[1]["speaker"]

    def recordings_of(self, document: Document) -> list[tuple[int, Path | TarMember]]:
        recordings = super().recordings_of(document)
        if not document.turns:
            return recordings
        return [(index, sound) for index, sound in recordings if document.turns[index].role == "assistant"]

    def shard_is_finished(self, index: int) -> bool:
        return self._shard_folder(index).is_dir()

    def _shard_folder(self, index: int) -> Path:
        return self.part / f"shard-{index:05d}"

    def make_shard(self, index: int, pool: ThreadPoolExecutor) -> None:
        recordings: list[dict[str, np.ndarray]] = []
        problem_count = len(self.problems)
        for group, sounds in self.read_groups(self.documents(index), pool):
            for document in group:
                if not document.turns and not self.recordings_of(document):
                    self.add_problem(document.line, "has no recording, expected audio")
            if sounds and len(self.problems) == problem_count:
                recordings += self._features(sounds, pool)
        if len(self.problems) > problem_count:
            return
        with atomic_folder(self._shard_folder(index)) as folder:
            np.save(folder / "counts.npy", np.array([len(arrays["f0"]) for arrays in recordings], np.int32))
            for name in ("codes", "mel", "wave", "f0", "embedding"):
                parts = [arrays[name] for arrays in recordings if name in arrays]
                if parts:
                    np.save(folder / f"{name}.npy", np.stack(parts) if name == "embedding" else np.concatenate(parts))

    def _features(self, sounds: Sequence[ReadSound], pool: ThreadPoolExecutor) -> list[dict[str, np.ndarray]]:
        """Of each recording `wave` int16, `mel`, `f0` and, if the system can make them, `codes` and `embedding`."""
        config = self.decoder_config
        hop = config.vocoder.hop
        per_code = config.samples_per_code
        recordings: list[dict[str, np.ndarray]] = []
        for sound in sounds:
            wave = resample(sound.recording.wave, sound.recording.rate, config.sample_rate)
            wave = np.pad(wave, (0, max(-len(wave) % per_code, per_code - len(wave))))
            recordings.append({"wave": to_pcm16(wave)})
        # Features are those of the rounded samples, which the data set holds.
        waves = [from_pcm16(arrays["wave"]) for arrays in recordings]
        f0 = pool.map(lambda wave: estimate_f0(wave, config.sample_rate, hop), waves)
        for arrays, wave in zip(recordings, waves, strict=True):
            arrays["mel"] = log_mel(wave, config)
            if self.speaker_config is not None:
                speech = resample(wave, config.sample_rate, SPEAKER_RATE)
                arrays["embedding"] = np.asarray(speaker_embedding(self.speaker_config, self.speaker_params, speech))
        for arrays, values in zip(recordings, f0, strict=True):
            arrays["f0"] = values
        if self.tokenizer_config is not None:
            rate = self.tokenizer_config.sample_rate
            inputs = [resample(sound.recording.wave, sound.recording.rate, rate) for sound in sounds]
            for arrays, codes in zip(recordings, self.speech_tokenizer.encode(inputs), strict=True):
                arrays["codes"] = codes.astype(np.int32)
                _cut_to_whole_codes(arrays, config.flow.frames_per_code, hop)
        return recordings

    def seal(self) -> None:
        totals = self._totals()
        write_text(self.part / SOURCE_FILE, json.dumps(self.source | totals, indent=1) + "\n")

    def _totals(self) -> dict[str, Any]:
        """Counts, and the mel's mean per bin and standard deviation over everything."""
        documents = 0
        frames = 0
        total = np.zeros(self.decoder_config.flow.mel_bins)
        squares = np.zeros(self.decoder_config.flow.mel_bins)
        for index in range(self.shard_count):
            folder = self._shard_folder(index)
            if not (folder / "mel.npy").is_file():
                continue  # a shard of conversations without a spoken reply
            mel = np.load(folder / "mel.npy", mmap_mode="r")
            documents += len(np.load(folder / "counts.npy", mmap_mode="r"))
            frames += len(mel)
            total += mel.sum(0, dtype=np.float64)
            squares += np.square(mel, dtype=np.float64).sum(0)
        if not frames:
            raise MossError(f"{self.manifest.path}: has no recording, expected some to train a speech decoder on")
        mean = total / frames
        deviation = np.sqrt(np.maximum(squares.mean() / frames - mean.mean() ** 2, 0))
        return {
            "documents": documents,
            "frames": frames,
            "mel_mean": mean.round(6).tolist(),
            "mel_deviation": round(float(deviation), 6),
        }


def _cut_to_whole_codes(arrays: dict[str, np.ndarray], frames_per_code: int, hop: int) -> None:
    """Cuts a recording to the codes that have all their frames, and to the frames that have a code."""
    count = min(len(arrays["codes"]), len(arrays["f0"]) // frames_per_code)
    frames = count * frames_per_code
    arrays["codes"] = arrays["codes"][:count]
    arrays["mel"] = arrays["mel"][:frames]
    arrays["f0"] = arrays["f0"][:frames]
    arrays["wave"] = arrays["wave"][: frames * hop]


@dataclass(frozen=True)
class _Source:
    """The fields of source.json that a reader uses."""

    mel_bins: int
    hop: int
    sample_rate: int
    frames_per_code: int
    codes: int | None
    embedding: int | None
    documents: int


class DecoderDataset:
    """A data set on disk, memory-mapped. May be pickled.

    Args:
        config: of the speech decoder that is trained.
        codes: whether codes are needed, as for a flow.

    Attributes:
        about: the content of source.json.
        counts: int32 [documents], mel frames of each recording.

    Raises:
        MossError: there is no data set, it has no codes though they are needed, or it does not fit `config`.
    """

    counts: np.ndarray

    def __init__(self, folder: str | Path, config: SpeechDecoderConfig, codes: bool):
        self.folder = Path(folder)
        if not (self.folder / SOURCE_FILE).is_file():
            raise MossError(
                f"{folder}: no {SOURCE_FILE} in it, expected a data set (moss-jax tokenize --format decoder)"
            )
        self.about = read_json(self.folder / SOURCE_FILE)
        if self.about.get("format") != DECODER_DATA_FORMAT:
            found = shown(self.about.get("format"))
            raise MossError(f"{folder}: format is {found}, expected {DECODER_DATA_FORMAT!r}")
        source = read_config(_Source, self.about, self.folder / SOURCE_FILE, foreign=True)
        expected = {
            "mel_bins": config.flow.mel_bins,
            "hop": config.vocoder.hop,
            "sample_rate": config.sample_rate,
            "frames_per_code": config.flow.frames_per_code,
        }
        for name, value in expected.items():
            if self.about[name] != value:
                raise MossError(f"{folder}: {name} is {self.about[name]}, the model's is {value}")
        if codes and source.codes is None:
            raise MossError(f"{folder}: made without a speech tokenizer, so it has no codes to train a flow on")
        if codes and source.codes is not None and source.codes > config.flow.codebook_size:
            raise MossError(
                f"{folder}: made with a speech tokenizer of {source.codes} codes, the flow has "
                f"{config.flow.codebook_size} (codebook_size)"
            )
        if codes and source.embedding not in (None, config.flow.speaker_size):
            raise MossError(
                f"{folder}: has speaker embeddings of size {source.embedding}, the flow's speaker_size is "
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
                f"{self.folder}: damaged, has {len(self.counts)} recordings, its {SOURCE_FILE} says "
                f"{self.about['documents']}"
            )
        # Of each recording: its shard, its first frame there, and its number there.
        self._shard = np.repeat(np.arange(len(shards)), [len(arrays["counts"]) for arrays in self._arrays])
        starts = [np.cumsum([0, *arrays["counts"]])[:-1] for arrays in self._arrays]
        self._starts = np.concatenate(starts)
        self._numbers = np.concatenate([np.arange(len(start)) for start in starts])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_") and name != "counts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.counts)

    def piece(self, index: int, first: int, frames: int, *names: str) -> dict[str, np.ndarray]:
        """Frames first .. first + frames - 1 of a recording.

        Args:
            names: of the arrays wanted: "mel" float32 [T, M], "wave" float32 [hop * T], "f0" float32 [T], "codes" int32
                (then `first` and `frames` are multiples of frames_per_code), "embedding" float32 [E] of the recording.
        """
        arrays = self._arrays[self._shard[index]]
        start = int(self._starts[index]) + first
        piece = {}
        for name in names:
            if name == "wave":
                samples = arrays["wave"][start * self.hop : (start + frames) * self.hop]
                piece[name] = from_pcm16(samples)
            elif name == "codes":
                size = self.frames_per_code
                piece[name] = np.asarray(arrays["codes"][start // size : (start + frames) // size])
            elif name == "embedding":
                piece[name] = np.asarray(arrays["embedding"][self._numbers[index]])
            else:
                piece[name] = np.asarray(arrays[name][start : start + frames])
        return piece

    @property
    def has_embeddings(self) -> bool:
        return self.about["embedding"] is not None

"""Building a data set of training examples: recordings become codes, documents become examples.

Besides finished shards, OUT.part holds a journal of the codes of the shard that is being made, so that an interrupted
build does not encode a recording twice.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moss_jax.audio import MAX_BYTES, Recording, resample
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.components import check_codes
from moss_jax.data.build import DatasetBuild, ReadSound, file_digest, folder_digests
from moss_jax.data.formats import Example, ExampleBuilder
from moss_jax.data.manifest import Document, Manifest, TarMember, Word
from moss_jax.data.store import Shard, seal, shard_name, vocabulary, write_shard
from moss_jax.documents import parse_json, read_json
from moss_jax.errors import MossError
from moss_jax.files import atomic_file, write_text
from moss_jax.progress import Say, silent
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT
from moss_jax.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from moss_jax.data.alignment import CTCAligner
    from moss_jax.speech_tokenizer.encode import SpeechTokenizer

CODE_RATE = 12.5  # codes per second where no speech tokenizer is needed, so that its config is not read
WORD_TIME_TOLERANCE = 0.5  # seconds that the last word may end after its recording: transcribers round up


@dataclass(frozen=True)
class TokenizeRequest:
    """What `tokenize` makes.

    Attributes:
        manifest: JSON lines.
        model: a system folder; its text tokenizer is used, and for recordings its speech tokenizer.
        format: one of manifest.FORMATS.
        out: the data set's folder.
        seed: of random cuts.
        variants: examples per document, for formats that cut at random.
        system: content of a system turn, for asr, tts and chat.
        aligner: folder of a CTC checkpoint that finds missing word times, for the format interleaved.
        shard_documents: documents per shard.
        process_index, process_count: which share of the shards this process makes. Process 0 waits for the others.
        max_audio_bytes: the most decoded bytes of one recording (`moss_jax.audio.read_audio`).
    """

    manifest: Path
    model: Path
    format: str
    out: Path
    seed: int = 0
    variants: int = 1
    system: str | None = None
    aligner: Path | None = None
    shard_documents: int = 4096
    process_index: int = 0
    process_count: int = 1
    max_audio_bytes: int = MAX_BYTES

    def check(self) -> None:
        """Raises MossError for values that do not fit together."""
        if self.format == "decoder":
            raise MossError("format decoder: its data sets hold no examples, expected moss_jax.data.decoder_data")
        for name in ("variants", "shard_documents", "process_count"):
            if getattr(self, name) < 1:
                raise MossError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.process_index < self.process_count:
            raise MossError(f"process_index is {self.process_index}, expected 0 to {self.process_count - 1}")
        if self.seed < 0:
            raise MossError(f"seed is {self.seed}, expected 0 or more")
        if self.variants > 1 and self.format not in ("interleaved", "continuation"):
            raise MossError(
                f"variants is {self.variants}, but documents of the format {self.format} have one variant only"
            )
        if self.system is not None and self.format not in ("asr", "tts", "chat"):
            raise MossError(f"system: the format {self.format} has no system turn, expected asr, tts or chat")
        if self.aligner is not None and self.format != "interleaved":
            raise MossError(f"aligner: the format {self.format} needs no word times, expected interleaved")


def tokenize(request: TokenizeRequest, say: Say = silent) -> dict[str, Any] | None:
    """Makes this process's share of a data set and, in process 0, the data set.

    Args:
        say: receives progress, one line at a time.

    Returns:
        The content of source.json; None in processes other than 0.

    Raises:
        MossError: bad lines (all of them, by number; finished shards stay in OUT.part), a model that does not fit, OUT
            or OUT.part holding something else, or a folder that cannot be written.
    """
    request.check()
    return _ExamplesBuild(request, say).build()


@dataclass(frozen=True)
class _EncodedDocument:
    """The codes of each entry of `document.sounds` (None: a written turn), and words whose times were aligned."""

    codes: list[np.ndarray | None]
    words: list[Word] | None


class _ExamplesBuild(DatasetBuild):
    def __init__(self, request: TokenizeRequest, say: Say):
        self.request = request
        self.folder = SystemFolder(request.model)
        check_codes(self.folder)
        self.config = self.folder.config(SPEECH_LM)
        if request.format != "text" and not self.config.audio_vocab_size:
            raise MossError(f"{request.model}: its transformer has no audio branch, expected one for {request.format}")
        self.text_tokenizer = TextTokenizer.from_file(self.folder.text_tokenizer_path, self.config)
        manifest = Manifest(
            request.manifest, request.format, code_count=self.config.eosp_id, align=request.aligner is not None
        )
        self.encodes = manifest.has_audio and request.format != "text"
        if self.encodes:
            tokenizer_config = self.folder.config(SPEECH_TOKENIZER)
            self.sample_rate = tokenizer_config.sample_rate
            self.code_rate = tokenizer_config.code_rate
        else:
            self.code_rate = CODE_RATE
        settings = {
            "kind": request.format,
            "text_tokenizer": file_digest(self.folder.path / "text_tokenizer" / "tokenizer.json"),
            "vocabulary": vocabulary(self.config),
            "settings": self._example_settings(),
        }
        super().__init__(
            manifest,
            request.out,
            settings,
            {"manifest": manifest.fingerprint(0, len(manifest)), **settings},
            say,
            shard_documents=request.shard_documents,
            max_audio_bytes=request.max_audio_bytes,
            process_index=request.process_index,
            process_count=request.process_count,
        )

    def _example_settings(self) -> dict[str, Any]:
        """What the examples depend on besides the manifest, the vocabulary and the text tokenizer."""
        fields = asdict(self.request)
        settings = {name: fields[name] for name in ("format", "seed", "variants", "system", "shard_documents")}
        if self.request.format == "chat" and not self.request.system:
            settings["default_system"] = DEFAULT_SYSTEM_PROMPT
        if self.encodes:
            settings["speech_tokenizer"] = folder_digests(self.folder.component_folder("speech_tokenizer"))
        if self.request.aligner is not None:
            settings["aligner"] = str(self.request.aligner)
        return settings

    @cached_property
    def speech_tokenizer(self) -> "SpeechTokenizer":
        import jax

        from moss_jax.speech_tokenizer.encode import SpeechTokenizer

        return SpeechTokenizer.load(self.folder.component_folder("speech_tokenizer"), devices=jax.local_devices())

    @cached_property
    def aligner(self) -> "CTCAligner":
        from moss_jax.data.alignment import CTCAligner

        assert self.request.aligner is not None  # without one the manifest has the words' times
        return CTCAligner(self.request.aligner)

    @cached_property
    def example_builder(self) -> ExampleBuilder:
        request = self.request
        return ExampleBuilder(
            request.format, self.config, self.text_tokenizer, self.code_rate, request.seed, request.system
        )

    def device_count(self) -> int:
        if not self.encodes:
            return 1
        import jax

        return jax.local_device_count()

    def read(self, sound: Path | TarMember) -> Recording:
        recording = super().read(sound)
        wave = resample(recording.wave, recording.rate, self.sample_rate)
        return replace(recording, wave=wave, rate=self.sample_rate)

    def shard_is_finished(self, index: int) -> bool:
        return self._finished_shard(index) is not None

    def _finished_shard(self, index: int) -> Shard | None:
        """The description of a shard, if the shard is there and made from the manifest's present lines."""
        path = self.part / f"shard-{index:05d}.json"
        # `seal` has renamed some of the shards where it was interrupted.
        shard_files = (path.with_suffix(""), self.part / shard_name(index, self.shard_count))
        if not path.is_file() or not any(file.is_file() for file in shard_files):
            return None
        description = read_json(path)
        span = self.span(index)
        if description.pop("fingerprint") != self.manifest.fingerprint(span.start, span.stop):
            return None
        return Shard(**description)

    def make_shard(self, index: int, pool: ThreadPoolExecutor) -> None:
        path = self.part / f"shard-{index:05d}"
        journal = self.part / f"shard-{index:05d}.codes"
        span = self.span(index)
        problem_count = len(self.problems)
        encoded = self._encode_shard(index, journal, pool) if self.request.format != "text" else {}
        examples = self._examples(index, encoded)
        first = next(examples, None)
        shard = write_shard(path, chain([first], examples)) if first else None
        if shard is None or len(self.problems) > problem_count:
            path.unlink(missing_ok=True)
            return
        fingerprint = self.manifest.fingerprint(span.start, span.stop)
        write_text(self.part / f"{path.name}.json", json.dumps({"fingerprint": fingerprint, **asdict(shard)}))
        shutil.rmtree(journal, ignore_errors=True)
        if self.request.format == "text":
            self.report_progress(len(span))

    def seal(self) -> None:
        shards = [self._finished_shard(index) for index in range(self.shard_count)]
        paths = [self.part / f"shard-{index:05d}" for index in range(self.shard_count)]
        seal(self.part, paths, [shard for shard in shards if shard is not None], self.source)

    def leftovers(self) -> list[Path]:
        return list(self.part.glob("shard-*"))  # descriptions, and shards of lines that are no longer in the manifest

    def _examples(self, index: int, encoded: dict[str, _EncodedDocument]) -> Iterator[Example]:
        for document in self.documents(index):
            codes: Sequence[np.ndarray | None] = ()
            words = None
            if document.digest in encoded:
                codes = encoded[document.digest].codes
                words = encoded[document.digest].words
            if document.sounds and self.request.format != "text" and not codes:
                continue  # one of the bad lines
            try:
                if words:
                    document = document.with_words(words)
                for variant in range(self.request.variants):
                    yield self.example_builder.example(document, codes, variant)
            except MossError as error:
                self.add_problem(document.line, str(error))

    def _encode_shard(self, index: int, journal: Path, pool: ThreadPoolExecutor) -> dict[str, _EncodedDocument]:
        """The codes of a shard's documents, by document digest. Codes in the journal are not computed again."""
        encoded = _read_journal(journal)
        missing = []
        for document in self.documents(index):
            if document.digest in encoded:
                self.count_done(1)
            else:
                missing.append(document)
        for group, sounds in self.read_groups(missing, pool):
            group_codes = self._encode_group(group, sounds)
            if self.encodes and group_codes:
                _write_journal(journal, group_codes)
            encoded |= group_codes
        return encoded

    def _encode_group(self, group: Sequence[Document], sounds: Sequence[ReadSound]) -> dict[str, _EncodedDocument]:
        waves = {(sound.document.line, sound.index): sound.recording.wave for sound in sounds}
        codes: dict[tuple[int, int], np.ndarray] = {}
        if waves:
            codes = dict(zip(waves, self.speech_tokenizer.encode(list(waves.values())), strict=True))
        encoded = {}
        for document in group:
            if document.line in self.bad_documents:
                continue
            document_codes: list[np.ndarray | None] = []
            for index, sound in enumerate(document.sounds):
                # What was not encoded is codes of the manifest, or the None of a written turn.
                given = sound if isinstance(sound, np.ndarray) else None
                document_codes.append(codes.get((document.line, index), given))
            try:
                words = self._aligned_words(document, waves.get((document.line, 0)))
            except MossError as error:
                self.add_problem(document.line, str(error))
                continue
            encoded[document.digest] = _EncodedDocument(document_codes, words)
        return encoded

    def _aligned_words(self, document: Document, wave: np.ndarray | None) -> list[Word] | None:
        """The words' times where they are needed and not given. Raises MossError where they are given and wrong."""
        if document.words is not None:
            if wave is not None:
                self._check_times(document.words, len(wave))
            return None
        if self.request.format != "interleaved":
            return None
        if wave is None:
            raise MossError("has codes, but neither audio nor words (their times); word times are aligned with audio")
        assert document.text is not None  # the manifest was checked for it
        return self.aligner.words(resample(wave, self.sample_rate, self.aligner.sample_rate), document.text)

    def _check_times(self, words: Sequence[Word], samples: int) -> None:
        seconds = samples / self.sample_rate
        if words[-1].end > seconds + WORD_TIME_TOLERANCE:
            raise MossError(f"words: the last one ends at {words[-1].end:g} s, the recording at {seconds:.2f} s")


def _write_journal(folder: Path, encoded: dict[str, _EncodedDocument]) -> None:
    """Writes a file FOLDER/DIGEST.npz of codes and aligned words; DIGEST is that of the first document in it."""
    arrays: dict[str, Any] = {}
    index = []
    for digest, document in encoded.items():
        has_codes = [codes is not None for codes in document.codes]
        words = None if document.words is None else [astuple(word) for word in document.words]
        index.append([digest, has_codes, words])
        arrays |= {f"{digest}/{at}": codes for at, codes in enumerate(document.codes) if codes is not None}
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise MossError(f"{folder}: cannot be made ({error.strerror}); choose a writable place") from error
    with atomic_file(folder / f"{next(iter(encoded))}.npz") as part, part.open("wb") as file:
        np.savez(file, index=np.array(json.dumps(index)), **arrays)


def _read_journal(folder: Path) -> dict[str, _EncodedDocument]:
    encoded: dict[str, _EncodedDocument] = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            for digest, has_codes, words in parse_json(str(arrays["index"])):
                codes = [arrays[f"{digest}/{at}"] if has else None for at, has in enumerate(has_codes)]
                encoded[digest] = _EncodedDocument(codes, None if words is None else [Word(*word) for word in words])
    return encoded

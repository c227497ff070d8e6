"""A manifest into a data set: recordings become codes, documents become examples, examples become shards.

Documents are divided into shards of equal number, and shards among processes. What is done lies in FOLDER.part: whole
shards, and the codes of the shard that is being made. The same command goes on there after it was killed; when every
shard is there, FOLDER.part becomes FOLDER.
"""

import hashlib
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.audio import MAX_BYTES, Recording, check_speech, read_audio, resample
from moss_jax.checkpoint import atomic_file, write_text
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.components import check_codes
from moss_jax.data.formats import Example, Maker
from moss_jax.data.manifest import Document, Manifest, Member, Word, bad_lines, tar_members
from moss_jax.data.store import SOURCE, Shard, seal, shard_name, vocabulary, write_shard
from moss_jax.documents import parse_json, read_json
from moss_jax.errors import MossError
from moss_jax.files import output_lock
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT
from moss_jax.text.tokenizer import TextTokenizer

SETTINGS = "settings.json"
# documents that are encoded together, and of what size, for each device
GROUP = 16
GROUP_BYTES = 128 * 2**20
READERS = min(16, os.cpu_count() or 1)  # threads that read recordings
CODE_RATE = 12.5  # codes a second, where there is no speech tokenizer that says it
LATE = 0.5  # seconds that a word may end after its recording: transcribers round up
Say = Callable[[str], None]
Heard = tuple[Sequence[np.ndarray | None], list[Word] | None]  # codes of each sound, and words that were aligned

Reading = tuple[Document, int, Future]  # a document, which of its sounds, and its wave when it has been read


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        manifest: JSON lines.
        model: a system folder; of its parts the text tokenizer is needed, and the speech tokenizer for recordings.
        format: one of manifest.FORMATS.
        out: the data set's folder.
        seed: of cuts. variants: examples a document, for formats that cut at random.
        system: a system turn, for asr, tts and chat.
        aligner: folder of a CTC checkpoint that finds missing word times, for the format interleaved.
        shard_documents: documents in a shard.
        process_index, process_count: which share of the shards this process makes. Process 0 waits for the others.
        max_audio_bytes: the most decoded samples of one recording (`moss_jax.audio.read_audio`).
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
        """Raises MossError for what makes no sense."""
        if self.format == "decoder":
            raise MossError("format decoder: its data sets hold no examples, expected moss_jax.data.spoken")
        for name in ("variants", "shard_documents", "process_count"):
            if getattr(self, name) < 1:
                raise MossError(f"{name} is {getattr(self, name)}, expected 1 at least")
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


def tokenize(request: Request, say: Say = lambda line: None) -> dict[str, Any] | None:
    """Makes this process's share of a data set, and in process 0 the data set.

    Args:
        say: told how far it is, one line at a time.

    Returns:
        What source.json says; None in other processes than 0.

    Raises:
        MossError: bad lines (all of them, by number; whatever is good stays in FOLDER.part), a model that does not fit,
            a FOLDER or FOLDER.part of something else, or a place that cannot be written.
    """
    request.check()
    return _Work(request, say).run()


class _Work:
    def __init__(self, request: Request, say: Say):
        self.request = request
        self.say = say
        folder = SystemFolder(request.model)
        check_codes(folder)
        self.folder = folder
        self.config = folder.config(SPEECH_LM)
        if request.format != "text" and not self.config.audio_vocab_size:
            raise MossError(f"{request.model}: its transformer has no audio branch, expected one for {request.format}")
        self.text_tokenizer = TextTokenizer.from_file(folder.text_tokenizer_path, self.config)
        self.manifest = Manifest(
            request.manifest, request.format, code_count=self.config.eosp_id, align=request.aligner is not None
        )
        self.encodes = self.manifest.has_sound and request.format != "text"
        self.ear = folder.config(SPEECH_TOKENIZER) if self.encodes else None
        self.shards = -(-len(self.manifest) // request.shard_documents)
        self.part = request.out.with_name(request.out.name + ".part")
        self.about = {
            "kind": request.format,
            "text_tokenizer": _digest(folder.path / "text_tokenizer" / "tokenizer.json"),
            "vocabulary": vocabulary(self.config),
            "settings": self._settings(),
        }
        self.problems: list[tuple[int, str]] = []
        self.done = 0
        self.seconds = 0.0
        self.begun = time.monotonic()

    def _settings(self) -> dict[str, Any]:
        asked = asdict(self.request)
        settings = {name: asked[name] for name in ("format", "seed", "variants", "system", "shard_documents")}
        if self.request.format == "chat" and not self.request.system:
            settings["default_system"] = DEFAULT_SYSTEM_PROMPT
        if self.encodes:
            component_folder = self.folder.component_folder("speech_tokenizer")
            settings["speech_tokenizer"] = [
                _digest(path) for path in sorted(component_folder.iterdir()) if path.is_file()
            ]
        if self.request.aligner is not None:
            settings["aligner"] = str(self.request.aligner)
        return settings

    @cached_property
    def speech_tokenizer(self):
        import jax

        from moss_jax.speech_tokenizer.encode import SpeechTokenizer

        return SpeechTokenizer.load(self.folder.component_folder("speech_tokenizer"), devices=jax.local_devices())

    @cached_property
    def aligner(self):
        from moss_jax.data.alignment import CTCAligner

        return CTCAligner(self.request.aligner)

    @cached_property
    def maker(self) -> Maker:
        rate = self.ear.code_rate if self.ear else CODE_RATE
        request = self.request
        return Maker(request.format, self.config, self.text_tokenizer, rate, request.seed, request.system)

    def run(self) -> dict[str, Any] | None:
        request = self.request
        out = self.request.out
        if not out.name:
            raise MossError(f"{out}: no folder's name, expected one that is to be made")
        with output_lock(out, request.process_index, request.process_count):
            return self._run_share()

    def _run_share(self) -> dict[str, Any] | None:
        request = self.request
        out = self.request.out
        whole = self._source()
        if (out / SOURCE).is_file():
            if not self._is_whole(out, whole):
                raise MossError(f"{out}: already there, of another manifest, model or settings; choose another folder")
            self.say(f"{out} is there already")
            return read_json(out / SOURCE)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise MossError(f"{out}: already there and no data set; choose another folder")
        self._begin_part()
        if not request.process_index and self._is_whole(self.part, whole):  # killed just before the folder was renamed
            return self._finish()
        for index in range(request.process_index, self.shards, request.process_count):
            self._make_shard(index)
        if self.problems:
            raise bad_lines(self.manifest.path, self.problems, len(self.manifest))
        if request.process_index:
            return None
        known = self._wait()
        for index in range(1, request.process_count):
            with output_lock(out, index, request.process_count, wait=True):
                pass  # this process has finished with its last shard
        paths = [self.part / f"shard-{index:05d}" for index in range(self.shards)]
        seal(self.part, paths, known, whole)
        return self._finish()

    def _source(self) -> dict[str, Any]:
        """What source.json of the finished data set says about where it is from."""
        return {"manifest": self.manifest.fingerprint(0, len(self.manifest)), **self.about}

    def _is_whole(self, folder: Path, whole: dict[str, Any]) -> bool:
        if not (folder / SOURCE).is_file():
            return False
        about = read_json(folder / SOURCE)
        return {key: about.get(key) for key in whole} == whole

    def _finish(self) -> dict[str, Any]:
        out = self.request.out
        for path in self.part.glob("*"):
            if path.name == SETTINGS or path.name.startswith("shard-"):  # those of lines that are gone, too
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            os.replace(self.part, out)  # an empty folder is replaced
        except OSError as error:
            # Locks do not reach every file system: the same data set may have been finished by another process.
            if not self._is_whole(out, self._source()):
                raise MossError(f"{out}: cannot be written ({error.strerror}); choose another folder") from error
        return read_json(out / SOURCE)

    def _begin_part(self) -> None:
        try:
            self.part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MossError(f"{self.part}: cannot be made ({error.strerror}); choose a writable place") from error
        settings = self.part / SETTINGS
        if not settings.exists():
            write_text(settings, json.dumps(self.about, indent=1) + "\n")
        if read_json(settings) != json.loads(json.dumps(self.about)):
            raise MossError(
                f"{self.part}: begun with another model or other settings; repeat those, or remove it to begin anew"
            )

    def _span(self, index: int) -> tuple[int, int]:
        start = index * self.request.shard_documents
        return start, min(start + self.request.shard_documents, len(self.manifest))

    def _made(self, index: int) -> Shard | None:
        """What was written of a shard, if it is there and of these lines."""
        known = self.part / f"shard-{index:05d}.json"
        places = known.with_suffix(""), self.part / shard_name(index, self.shards)
        if not known.is_file() or not any(path.is_file() for path in places):
            return None
        found = read_json(known)
        if found.pop("fingerprint") != self.manifest.fingerprint(*self._span(index)):
            return None
        return Shard(**found)

    def _make_shard(self, index: int) -> None:
        start, stop = self._span(index)
        if self._made(index) is not None:
            self.done += stop - start
            return
        path, journal = (self.part / f"shard-{index:05d}{ending}" for ending in ("", ".codes"))
        found = len(self.problems)
        sounds = self._codes(start, stop, journal) if self.request.format != "text" else {}
        examples = self._examples(start, stop, sounds)
        first = next(examples, None)
        shard = write_shard(path, chain([first], examples)) if first else None
        if shard is None or len(self.problems) > found:
            path.unlink(missing_ok=True)
            return
        fingerprint = self.manifest.fingerprint(start, stop)
        write_text(self.part / f"{path.name}.json", json.dumps({"fingerprint": fingerprint, **asdict(shard)}))
        shutil.rmtree(journal, ignore_errors=True)
        if self.request.format == "text":
            self.done += stop - start
            self._tell()

    def _examples(self, start: int, stop: int, sounds: dict[str, Heard]) -> Iterator[Example]:
        for document in self.manifest.documents(start, stop):
            codes, words = sounds.get(document.digest, ((), None))
            if document.sounds and self.request.format != "text" and not codes:
                continue  # it is among the bad lines
            try:
                if words:
                    document = document.with_words(words)
                for variant in range(self.request.variants):
                    yield self.maker.example(document, codes, variant)
            except MossError as error:
                self.problems.append((document.line, str(error)))

    def _codes(self, start: int, stop: int, journal: Path) -> dict[str, Heard]:
        """What is heard in a shard's documents, by digest. What was encoded before is taken from the journal."""
        heard = _read_journal(journal)
        missing = []
        for document in self.manifest.documents(start, stop):
            if document.digest in heard:
                self.done += 1
            else:
                missing.append(document)
        groups = list(self._groups(missing))
        with ThreadPoolExecutor(READERS) as pool:
            ahead: list[Reading] = []
            for place, group in enumerate(groups):
                reading = ahead or self._read_group(pool, group)
                ahead = self._read_group(pool, groups[place + 1]) if place + 1 < len(groups) else []
                made = self._encode(group, reading)
                if self.encodes and made:
                    _write_journal(journal, made)
                heard |= made
                self.done += len(group)
                self._tell()
        return heard

    def _groups(self, documents: Sequence[Document]) -> Iterator[list[Document]]:
        """Documents that are encoded together: enough for all devices, no more than fits into memory."""
        devices = _devices() if self.encodes else 1
        group = []
        size = 0
        for document in documents:
            group.append(document)
            size += sum(map(_bytes, document.sounds))
            if len(group) == GROUP * devices or size > GROUP_BYTES * devices:
                yield group
                group = []
                size = 0
        if group:
            yield group

    def _read_group(self, pool: ThreadPoolExecutor, group: Sequence[Document]) -> list[Reading]:
        return [
            (document, at, pool.submit(self._read, sound))
            for document in group
            for at, sound in enumerate(document.sounds)
            if isinstance(sound, Path | Member)
        ]

    def _encode(self, group: Sequence[Document], reading: Sequence[Reading]) -> dict[str, Heard]:
        waves = {}
        bad = set()
        for document, at, future in reading:
            read = future.result()
            if isinstance(read, MossError):
                bad.add(document.line)
                self.problems.append((document.line, str(read)))
            else:
                waves[document.line, at] = read.wave
                self.seconds += len(read.wave) / read.rate
                for notice in read.notices:
                    self.say(f"note: line {document.line}: {notice}")
        codes = dict(zip(waves, self.speech_tokenizer.encode(list(waves.values())), strict=True)) if waves else {}
        heard = {}
        for document in group:
            if document.line in bad:
                continue
            said = [codes.get((document.line, at), sound) for at, sound in enumerate(document.sounds)]
            try:
                heard[document.digest] = said, self._times(document, waves.get((document.line, 0)))
            except MossError as error:
                self.problems.append((document.line, str(error)))
        return heard

    def _times(self, document: Document, wave: np.ndarray | None) -> list[Word] | None:
        """The words' times, where they are needed and not given. Raises MossError where they are given and wrong."""
        if document.words is not None:
            if wave is not None:
                self._check_times(document.words, len(wave))
            return None
        if self.request.format != "interleaved":
            return None
        if wave is None:
            raise MossError("has codes but no audio and no words, so that there is nothing to align")
        rate = self.ear.sample_rate
        return self.aligner.words(resample(wave, rate, self.aligner.sample_rate), document.text)

    def _read(self, sound: Path | Member) -> Recording | MossError:
        """The recording at the speech tokenizer's rate, or what is wrong with it."""
        rate = self.ear.sample_rate
        read = read_speech(sound, self.request.max_audio_bytes)
        if isinstance(read, MossError):
            return read
        return replace(read, wave=resample(read.wave, read.rate, rate), rate=rate)

    def _check_times(self, words: Sequence[Word], samples: int) -> None:
        seconds = samples / self.ear.sample_rate
        if words[-1].end > seconds + LATE:
            raise MossError(f"words: the last one ends at {words[-1].end:g} s, the recording at {seconds:.2f} s")

    def _tell(self) -> None:
        count = self._share()
        passed = time.monotonic() - self.begun
        line = f"{self.done} of {count} documents"
        if self.seconds:
            line += f", {self.seconds / 3600:.2f} h of sound at {self.seconds / max(passed, 1e-9):.1f} x real time"
        if self.problems:
            line += f", {len(self.problems)} bad lines"
        if 0 < self.done < count:
            line += f", {_duration(passed * (count - self.done) / self.done)} to go"
        self.say(line)

    def _share(self) -> int:
        spans = (self._span(i) for i in range(self.request.process_index, self.shards, self.request.process_count))
        return sum(stop - start for start, stop in spans)

    def _wait(self) -> list[Shard]:
        """All shards, once the other processes have made theirs."""
        known: dict[int, Shard] = {}
        while True:
            for index in range(self.shards):
                if index not in known and (shard := self._made(index)) is not None:
                    known[index] = shard
            missing = self.shards - len(known)
            if not missing:
                return [known[index] for index in range(self.shards)]
            self.say(f"waiting for other processes: {missing} of {self.shards} shards are missing")
            time.sleep(2)


def read_speech(sound: Path | Member, max_bytes: int) -> Recording | MossError:
    """`read_sound` for a recording that must hold speech. Threads return their errors, so that all of them are kept."""
    try:
        read = read_sound(sound, max_bytes)
        check_speech(read.wave, read.rate, str(sound))
    except MossError as error:
        return error
    return read


def read_sound(sound: Path | Member, max_bytes: int = MAX_BYTES) -> Recording:
    """A recording as `moss_jax.audio.read_audio` reads it, from a tar file too."""
    if isinstance(sound, Path):
        return read_audio(sound, max_bytes=max_bytes)
    entry = tar_members(sound.shard)[sound.name]
    try:
        with tarfile.open(sound.shard) as tar:
            return read_audio(tar.extractfile(entry), max_bytes=max_bytes, name=str(sound))
    except MossError:
        raise
    except (OSError, tarfile.TarError, EOFError) as error:
        raise MossError(f"{sound}: cannot be read ({error})") from error


def _bytes(sound: Path | Member | np.ndarray | None) -> int:
    if isinstance(sound, Path):
        return sound.stat().st_size if sound.exists() else 0
    return tar_members(sound.shard)[sound.name].size if isinstance(sound, Member) else 0


def _devices() -> int:
    import jax

    return jax.local_device_count()


def _write_journal(folder: Path, made: dict[str, Heard]) -> None:
    arrays: dict[str, Any] = {}
    index = []
    for digest, (codes, words) in made.items():
        index.append([digest, [said is not None for said in codes], words and [astuple(word) for word in words]])
        arrays |= {f"{digest}/{at}": said for at, said in enumerate(codes) if said is not None}
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise MossError(f"{folder}: cannot be made ({error.strerror}); choose a writable place") from error
    with atomic_file(folder / f"{next(iter(made))}.npz") as part, part.open("wb") as file:
        np.savez(file, index=json.dumps(index), **arrays)


def _read_journal(folder: Path) -> dict[str, Heard]:
    heard: dict[str, Heard] = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            for digest, there, words in parse_json(str(arrays["index"])):
                codes = [arrays[f"{digest}/{at}"] if is_there else None for at, is_there in enumerate(there)]
                heard[digest] = codes, words and [Word(*word) for word in words]
    return heard


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )

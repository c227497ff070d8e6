"""Building a data set from a manifest, shard by shard; an interrupted build is resumed by the same command.

Documents are divided into shards of equal size, and shards among processes. Until the data set is complete it is in
OUT.part, which holds settings.json (what the build was started with) and the finished shards. When all shards are
finished, OUT.part is renamed to OUT.
"""

import abc
import hashlib
import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jax.audio import MAX_BYTES, Recording, check_speech, read_audio
from moss_jax.data.manifest import Document, Manifest, TarMember, bad_lines, tar_members
from moss_jax.data.store import SOURCE_FILE
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.files import output_lock, write_text
from moss_jax.progress import Say, duration

SETTINGS_FILE = "settings.json"
READ_THREADS = min(16, os.cpu_count() or 1)
# Documents that are processed together on each device: at most this many, and files of about this size.
GROUP_DOCUMENTS = 16
GROUP_BYTES = 128 * 2**20
POLL_SECONDS = 2  # between two looks for the shards of other processes


@dataclass(frozen=True)
class ReadSound:
    """A recording of a document; `index` is its position in `document.sounds`."""

    document: Document
    index: int
    recording: Recording


class DatasetBuild(abc.ABC):
    """One build of a data set. A subclass defines what a shard is.

    Args:
        manifest: the documents.
        out: the data set's folder; must not exist, be empty, or be the finished data set of the same build.
        settings: content of settings.json, JSON values. A build is resumed only with the same settings.
        source: the fields of the finished source.json that tell this data set from others.
        say: receives progress and notes.
        shard_documents: documents per shard.
        max_audio_bytes: the most decoded bytes of one recording (`moss_jax.audio.read_audio`).
        process_index, process_count: this process makes every process_count-th shard, beginning with process_index.
            Process 0 waits for the others and completes the data set.
    """

    def __init__(
        self,
        manifest: Manifest,
        out: Path,
        settings: dict[str, Any],
        source: dict[str, Any],
        say: Say,
        *,
        shard_documents: int,
        max_audio_bytes: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.manifest = manifest
        self.out = out
        self.part = out.with_name(out.name + ".part") if out.name else out
        self.settings = settings
        self.source = source
        self.say = say
        self.shard_documents = shard_documents
        self.max_audio_bytes = max_audio_bytes
        self.process_index = process_index
        self.process_count = process_count
        self.shard_count = -(-len(manifest) // shard_documents)
        self.problems: list[tuple[int, str]] = []  # line number and what is wrong
        self.bad_documents: set[int] = set()  # line numbers
        self._done = 0  # documents
        self._seconds = 0.0  # of the recordings that were read
        self._start = time.monotonic()

    # What a subclass defines.

    @abc.abstractmethod
    def shard_is_finished(self, index: int) -> bool:
        """Whether OUT.part has this shard, made from the manifest's present lines."""

    @abc.abstractmethod
    def make_shard(self, index: int, pool: ThreadPoolExecutor) -> None:
        """Makes a shard, whole or not at all; what is wrong with its documents goes to `add_problem`."""

    @abc.abstractmethod
    def seal(self) -> None:
        """Makes OUT.part a complete data set, when all shards are finished. Writes source.json last."""

    def recordings_of(self, document: Document) -> list[tuple[int, Path | TarMember]]:
        """The recordings that are read, with their index in `document.sounds`."""
        return [(index, sound) for index, sound in enumerate(document.sounds) if isinstance(sound, Path | TarMember)]

    def read(self, sound: Path | TarMember) -> Recording:
        """Reads a recording, in a thread. Raises MossError if it cannot be read or holds no speech."""
        recording = read_sound(sound, self.max_audio_bytes)
        check_speech(recording.wave, recording.rate, str(sound))
        return recording

    def device_count(self) -> int:
        """Devices that share the work on a group of documents."""
        return 1

    def leftovers(self) -> Iterable[Path]:
        """Files and folders in OUT.part that do not belong to the complete data set, apart from settings.json."""
        return ()

    # The build.

    def build(self) -> dict[str, Any] | None:
        """Makes this process's shards and, in process 0, the data set.

        Returns:
            The content of source.json; None in processes other than 0.

        Raises:
            MossError: bad lines (all of them, by number; finished shards stay in OUT.part), another data set in OUT or
                OUT.part, another process at work, or a folder that cannot be written.
        """
        if not self.out.name:
            raise MossError(f"{self.out}: not the name of a folder, expected one that is to be made")
        with output_lock(self.out, self.process_index, self.process_count):
            return self._build_locked()

    def _build_locked(self) -> dict[str, Any] | None:
        out = self.out
        if (out / SOURCE_FILE).is_file():
            if not self._is_complete(out):
                raise MossError(
                    f"{out}: already exists, made from another manifest, model or settings; choose another folder"
                )
            self.say(f"{out} is already complete")
            return read_json(out / SOURCE_FILE)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise MossError(f"{out}: already exists and is not a data set; choose another folder")
        self._open_part()
        if self.process_index == 0 and self._is_complete(self.part):
            return self.publish()  # interrupted just before the folder was renamed
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for index in self._own_shards():
                if self.shard_is_finished(index):
                    self.count_done(len(self.span(index)))
                else:
                    self.make_shard(index, pool)
        if self.problems:
            raise bad_lines(self.manifest.path, self.problems, len(self.manifest))
        if self.process_index:
            return None
        self._wait_for_other_processes()
        self.seal()
        return self.publish()

    def _open_part(self) -> None:
        try:
            self.part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MossError(f"{self.part}: cannot be made ({error.strerror}); choose a writable place") from error
        if self.process_count == 1:  # otherwise these may be shards that another process is writing
            for unfinished in self.part.glob(".shard-*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        path = self.part / SETTINGS_FILE
        if not path.exists():
            write_text(path, json.dumps(self.settings, indent=1) + "\n")
        if read_json(path) != json.loads(json.dumps(self.settings)):
            raise MossError(
                f"{self.part}: was started with another model or other settings; use those again, or remove the folder "
                "to start over"
            )

    def _is_complete(self, folder: Path) -> bool:
        if not (folder / SOURCE_FILE).is_file():
            return False
        source = read_json(folder / SOURCE_FILE)
        return {key: source.get(key) for key in self.source} == self.source

    def publish(self) -> dict[str, Any]:
        """Renames the complete OUT.part to OUT."""
        (self.part / SETTINGS_FILE).unlink(missing_ok=True)
        for path in self.leftovers():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        try:
            os.replace(self.part, self.out)  # an empty folder is replaced
        except OSError as error:
            # Locks do not work on every file system: another process may have finished the same data set.
            if not self._is_complete(self.out):
                raise MossError(f"{self.out}: cannot be written ({error.strerror}); choose another folder") from error
        return read_json(self.out / SOURCE_FILE)

    def _own_shards(self) -> range:
        return range(self.process_index, self.shard_count, self.process_count)

    def span(self, index: int) -> range:
        """The documents of a shard."""
        start = index * self.shard_documents
        return range(start, min(start + self.shard_documents, len(self.manifest)))

    def documents(self, index: int) -> Iterator[Document]:
        """The documents of a shard, as the manifest has them."""
        span = self.span(index)
        return self.manifest.documents(span.start, span.stop)

    def add_problem(self, line: int, problem: str) -> None:
        self.problems.append((line, problem))
        self.bad_documents.add(line)

    def _wait_for_other_processes(self) -> None:
        missing = list(range(self.shard_count))
        while missing := [index for index in missing if not self.shard_is_finished(index)]:
            self.say(f"waiting for other processes: {len(missing)} of {self.shard_count} shards are missing")
            time.sleep(POLL_SECONDS)
        for index in range(1, self.process_count):
            with output_lock(self.out, index, self.process_count, wait=True):
                pass  # this process has finished its last shard

    # Reading recordings.

    def read_groups(
        self, documents: Iterable[Document], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[list[Document], list[ReadSound]]]:
        """Groups of documents with their recordings; the next group is read while the caller works on one.

        Recordings that cannot be read are bad lines and left out. Reports progress after each group.
        """
        groups = list(self._groups(documents))
        pending = self._start_reading(groups[0], pool) if groups else []
        for number, group in enumerate(groups, 1):
            current = pending
            pending = self._start_reading(groups[number], pool) if number < len(groups) else []
            yield group, self._finish_reading(current)
            self.report_progress(len(group))

    def _groups(self, documents: Iterable[Document]) -> Iterator[list[Document]]:
        """Documents that are processed together: enough for all devices, few enough for the memory."""
        devices = self.device_count()
        group: list[Document] = []
        size = 0
        for document in documents:
            group.append(document)
            size += sum(_file_size(sound) for _, sound in self.recordings_of(document))
            if len(group) == GROUP_DOCUMENTS * devices or size > GROUP_BYTES * devices:
                yield group
                group = []
                size = 0
        if group:
            yield group

    def _start_reading(
        self, group: Sequence[Document], pool: ThreadPoolExecutor
    ) -> list[tuple[Document, int, Future[Recording]]]:
        return [
            (document, index, pool.submit(self.read, sound))
            for document in group
            for index, sound in self.recordings_of(document)
        ]

    def _finish_reading(self, pending: Sequence[tuple[Document, int, Future[Recording]]]) -> list[ReadSound]:
        sounds = []
        for document, index, future in pending:
            try:
                recording = future.result()
            except MossError as error:
                self.add_problem(document.line, str(error))
                continue
            sounds.append(ReadSound(document, index, recording))
            self._seconds += len(recording.wave) / recording.rate
            for notice in recording.notices:
                self.say(f"note: line {document.line}: {notice}")
        return sounds

    def count_done(self, documents: int) -> None:
        """Counts documents that need no more work; `report_progress` reports them."""
        self._done += documents

    def report_progress(self, documents: int) -> None:
        """Counts documents as done and reports how far this process is."""
        self.count_done(documents)
        count = sum(len(self.span(index)) for index in self._own_shards())
        elapsed = time.monotonic() - self._start
        line = f"{self._done} of {count} documents"
        if self._seconds:
            speed = self._seconds / max(elapsed, 1e-9)
            line += f", {self._seconds / 3600:.2f} h of audio at {speed:.1f} x real time"
        if self.problems:
            line += f", {len(self.problems)} bad lines"
        if 0 < self._done < count:
            line += f", {duration(elapsed * (count - self._done) / self._done)} left"
        self.say(line)


def read_sound(sound: Path | TarMember, max_bytes: int = MAX_BYTES) -> Recording:
    """A recording as `moss_jax.audio.read_audio` reads it, from a file or from a member of a tar file."""
    if isinstance(sound, Path):
        return read_audio(sound, max_bytes=max_bytes)
    entry = tar_members(sound.shard)[sound.name]
    try:
        with tarfile.open(sound.shard) as tar:
            file = tar.extractfile(entry)
            assert file is not None  # tar_members lists regular files only
            return read_audio(file, max_bytes=max_bytes, name=str(sound))
    except MossError:
        raise
    except (OSError, tarfile.TarError, EOFError) as error:
        raise MossError(f"{sound}: cannot be read ({error})") from error


def _file_size(sound: Path | TarMember) -> int:
    if isinstance(sound, Path):
        return sound.stat().st_size if sound.exists() else 0
    return tar_members(sound.shard)[sound.name].size


def file_digest(path: Path) -> str:
    """BLAKE2b digest of a file, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def folder_digests(folder: Path) -> list[str]:
    """The digests of the files in a folder, in the order of their names."""
    return [file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()]

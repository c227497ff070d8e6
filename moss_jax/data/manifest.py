"""Manifests: JSON lines that name the documents of a data set. All bad lines are reported, by number.

    {"audio": "a.wav", "text": "Good morning.", "words": [["Good", 0.1, 0.4], ["morning", 0.5, 1.0]]}
    {"shard": "part-00.tar", "audio": "talks/7.flac"}
    {"turns": [{"role": "user", "audio": "q.wav"}, {"role": "assistant", "text": "Yes."}]}

Only the positions of the lines are kept in memory, so that a manifest may be long.
"""

import hashlib
import json
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.dialogue.turns import Turn
from moss_jax.documents import parse_object, read_lines, short, shown
from moss_jax.errors import MossError
from moss_jax.files import is_file, is_folder

FIELDS = ("id", "audio", "shard", "codes", "text", "words", "turns")
TURN_FIELDS = ("role", "audio", "shard", "codes", "text")
NEEDS = {
    "text": ("text",),
    "speech": ("sound",),
    "interleaved": ("sound", "words"),
    "continuation": ("sound",),
    "asr": ("sound", "text"),
    "tts": ("sound", "text"),
    "chat": ("turns",),
    "decoder": (),
}  # format -> what a line must have
FORMATS = tuple(NEEDS)
NEED_NAMES = {"sound": "audio", "text": "text", "words": "words (their times)", "turns": "turns"}  # for error messages
MAX_CODE = 2**31 - 1  # of codes for an unknown speech tokenizer: they are stored as int32


@dataclass(frozen=True)
class Word:
    """A word and its times, in seconds from the beginning of the recording."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class TarMember:
    """A recording inside a tar file."""

    shard: Path
    name: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"


Sound = Path | TarMember | np.ndarray  # a recording, or its codes int32 [codes]


@dataclass(frozen=True, eq=False)
class Document:
    """A line of a manifest.

    Attributes:
        line: its number, from 1.
        name: its id, or the number of the line.
        digest: of the line's content.
        sounds: one entry for a recording, one per turn for a conversation: the recording, its codes int32 [codes], or
            None for a written turn.
        text: the transcript, or the document itself.
        words: their times, in order; None if they are not known.
        turns: of a conversation; spoken turns have the text "" here and their sound in `sounds`.
    """

    line: int
    name: str
    digest: str = ""
    sounds: tuple[Sound | None, ...] = ()
    text: str | None = None
    words: tuple[Word, ...] | None = None
    turns: tuple[Turn, ...] = ()

    def with_words(self, words: Sequence[Word]) -> "Document":
        return replace(self, words=tuple(words))


class Manifest:
    """A manifest, of which every line has been checked.

    Args:
        path: the JSON lines; paths in them are relative to its folder. Empty lines are counted, but are no documents.
        format: one of FORMATS; a line without what it needs is bad.
        code_count: codes in the manifest must be less than this; None: any.
        align: word times may be missing where there is a text: they will be found by alignment.

    Attributes:
        has_audio: whether there are recordings (and not only codes).

    Raises:
        MossError: the file cannot be read or has no document, or lines are bad (all of them are reported, by number).
    """

    def __init__(self, path: str | Path, format: str, *, code_count: int | None = None, align: bool = False):
        if format not in FORMATS:
            raise MossError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
        self.path = Path(path)
        self.format = format
        self.code_count = code_count
        self.align = align
        self.has_audio = False
        self._positions, self._numbers = self._read()

    def __len__(self) -> int:
        return len(self._positions)

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        """The documents start .. stop - 1."""
        with self.path.open("rb") as file:
            for index in range(start, len(self) if stop is None else min(stop, len(self))):
                file.seek(self._positions[index])
                yield self._document(file.readline(), int(self._numbers[index]))

    def fingerprint(self, start: int, stop: int) -> str:
        """A digest of the lines of documents start .. stop - 1, with their numbers."""
        digest = hashlib.blake2b(digest_size=16)
        with self.path.open("rb") as file:
            for index in range(start, min(stop, len(self))):
                file.seek(self._positions[index])
                digest.update(b"%d " % self._numbers[index] + file.readline().strip() + b"\n")
        return digest.hexdigest()

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        positions: list[int] = []
        numbers: list[int] = []
        problems: list[tuple[int, str]] = []
        names: dict[str, int] = {}
        if not is_file(self.path):  # a pipe cannot be read a second time
            what = "is a folder" if is_folder(self.path) else "no such file"
            raise MossError(f"{self.path}: {what}, expected a manifest (a file of JSON lines)")
        for line in read_lines(self.path):
            positions.append(line.start)
            numbers.append(line.number)
            try:
                document = self._document(line.content, line.number)
                if document.name != str(line.number):
                    first = names.setdefault(document.name, line.number)
                    if first != line.number:
                        raise MossError(f"the id {shown(document.name)} is already that of line {first}")
                self.has_audio |= any(isinstance(sound, Path | TarMember) for sound in document.sounds)
            except MossError as error:
                problems.append((line.number, str(error)))
        if problems:
            raise bad_lines(self.path, problems, len(positions))
        if not positions:
            raise MossError(f"{self.path}: has no document, expected one JSON object per line")
        return np.array(positions, np.int64), np.array(numbers, np.int64)

    def _document(self, line: bytes, number: int) -> Document:
        entry = parse_object(line.strip())
        _check_fields(entry, FIELDS)
        name = entry.get("id", number)
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise MossError(f"id is {shown(name)}, expected a string or a number")
        digest = hashlib.blake2b(line.strip(), digest_size=16).hexdigest()
        document = Document(number, str(name), digest)
        if "turns" in entry:
            others = [key for key in entry if key not in ("id", "turns")]
            if others:
                raise MossError(f"has {', '.join(others)} beside turns, expected them inside the turns")
            document = self._conversation(document, entry["turns"])
        else:
            document = self._recording(document, entry)
        self._check_needs(document)
        return document

    def _recording(self, document: Document, entry: dict[str, Any]) -> Document:
        sound = self._sound(entry)
        text = _text(entry)
        words = _words(entry.get("words"))
        if words is not None:
            if text is None:
                text = " ".join(word.text for word in words)
            _check_words_in_text(words, text)
        if sound is None and text is None:
            raise MossError("is empty: has neither audio, codes, text nor turns")
        return replace(document, sounds=() if sound is None else (sound,), text=text, words=words)

    def _conversation(self, document: Document, entries: Any) -> Document:
        if not isinstance(entries, list) or not entries:
            raise MossError(f"turns is {_excerpt(entries)}, expected a list of turns")
        turns: list[Turn] = []
        sounds: list[Sound | None] = []
        for index, entry in enumerate(entries):
            try:
                if not isinstance(entry, dict):
                    raise MossError(f"is {_excerpt(entry)}, expected an object")
                _check_fields(entry, TURN_FIELDS)
                sound = self._sound(entry)
                text = _text(entry)
                if (sound is None) == (text is None):
                    raise MossError("has neither or both of text and speech (audio or codes), expected one of them")
                role: Any = entry.get("role")
                turns.append(Turn(role, text=text or ""))  # which checks the role
                sounds.append(sound)
            except MossError as error:
                raise MossError(f"turns[{index}]: {error}") from error
        if turns[-1].role != "assistant":
            raise MossError(f"turns: the last one is the {turns[-1].role}'s, expected the assistant's")
        for index, turn in enumerate(turns):
            if turn.role == "system" and index > 0:
                raise MossError(f"turns[{index}]: a system turn, expected only as the first turn")
        return replace(document, turns=tuple(turns), sounds=tuple(sounds))

    def _sound(self, entry: dict[str, Any]) -> Sound | None:
        audio = entry.get("audio")
        shard = entry.get("shard")
        codes = entry.get("codes")
        if codes is not None:
            if audio is not None or shard is not None:
                raise MossError("has audio and codes, expected one of them")
            return self._codes(codes)
        for key, value in (("audio", audio), ("shard", shard)):
            if value is not None and (not isinstance(value, str) or not value):
                raise MossError(f"{key} is {_excerpt(value)}, expected a file name")
        if audio is None:
            if shard is not None:
                raise MossError("has a shard, but no audio; expected the name of the recording in it")
            return None
        if shard is not None:
            member = TarMember(self.path.parent / shard, audio)
            if audio not in tar_members(member.shard):
                raise MossError(f"audio {short(audio)}: not in {short(shard)}")
            return member
        path = self.path.parent / audio
        if not is_file(path):
            raise MossError(f"audio {short(audio)}: {'is a folder' if is_folder(path) else 'no such file'}")
        return path

    def _codes(self, codes: Any) -> np.ndarray:
        if not isinstance(codes, list) or not all(type(code) is int for code in codes):
            raise MossError("codes is not a list of integers")
        if not codes:
            raise MossError("codes is empty, expected at least one code")
        largest = self.code_count - 1 if self.code_count else MAX_CODE
        wrong = next((code for code in codes if not 0 <= code <= largest), None)
        if wrong is not None:
            raise MossError(f"codes: {wrong} is not a code of this model, expected 0 to {largest}")
        return np.array(codes, np.int32)

    def _check_needs(self, document: Document) -> None:
        sounds = [sound for sound in document.sounds if sound is not None]
        has = {
            "sound": len(sounds) == 1 and not document.turns,
            "text": document.text is not None,
            "words": document.words is not None or (self.align and document.text is not None),
            "turns": bool(document.turns),
        }
        missing = [NEED_NAMES[need] for need in NEEDS[self.format] if not has[need]]
        if missing:
            raise MossError(f"has no {' and no '.join(missing)}, which the format {self.format} needs")


def bad_lines(path: Path, problems: Sequence[tuple[int, str]], line_count: int) -> MossError:
    """The error that lists bad lines, (number, problem) each; consecutive lines with one problem share an entry."""
    runs: list[tuple[int, int, str]] = []
    for number, problem in sorted(problems):
        if runs and runs[-1][1:] == (number - 1, problem):
            runs[-1] = (runs[-1][0], number, problem)
        else:
            runs.append((number, number, problem))
    entries = []
    for first, last, problem in runs:
        entries.append(f"line {first}: {problem}" if first == last else f"lines {first} to {last}: {problem}")
    count = len({number for number, _ in problems})
    lines = "line" if count == 1 else "lines"
    return MossError("\n  ".join([f"{path}: {count} bad {lines} of {line_count}", *entries]))


@lru_cache(maxsize=256)
def tar_members(path: Path) -> dict[str, tarfile.TarInfo]:
    """{name: entry} of the regular files in a tar file, which may be compressed."""
    if not is_file(path):
        raise MossError(f"shard {short(path)}: {'is a folder' if is_folder(path) else 'no such file'}")
    try:
        with tarfile.open(path) as tar:
            return {entry.name: entry for entry in tar if entry.isfile()}
    except Exception as error:  # tarfile passes on errors of the decompressors and of malformed numbers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MossError(f"shard {path}: not a readable tar file ({reason})") from error


def _check_fields(entry: dict[str, Any], fields: Sequence[str]) -> None:
    unknown = [key for key in entry if key not in fields]
    if unknown:
        raise MossError(f"unknown: {', '.join(map(short, unknown))}; expected {', '.join(fields)}")


def _text(entry: dict[str, Any]) -> str | None:
    text = entry.get("text")
    if text is not None and not isinstance(text, str):
        raise MossError(f"text is {_excerpt(text)}, expected a string")
    if text is not None and not text.strip():
        raise MossError("text is empty, expected some words")
    return text


def _words(entries: Any) -> tuple[Word, ...] | None:
    if entries is None:
        return None
    if not isinstance(entries, list) or not entries:
        raise MossError(f"words is {_excerpt(entries)}, expected [[word, start, end], ...]")
    words: list[Word] = []
    for index, entry in enumerate(entries):
        valid = (
            isinstance(entry, list)
            and len(entry) == 3
            and isinstance(entry[0], str)
            and all(type(time) in (int, float) and math.isfinite(time) for time in entry[1:])
        )
        if not valid or not entry[0].strip():
            raise MossError(f"words[{index}] is {_excerpt(entry)}, expected [word, start, end] with times in seconds")
        word = Word(entry[0].strip(), float(entry[1]), float(entry[2]))
        if not 0 <= word.start <= word.end:
            raise MossError(
                f"words[{index}]: {word.text!r} has the times {word.start:g} to {word.end:g} s, "
                "expected 0 <= start <= end"
            )
        if words and (word.start < words[-1].start or word.end < words[-1].end):
            previous = words[-1]
            raise MossError(
                f"words[{index}]: times are not in order, {word.text!r} {word.start:g} to {word.end:g} s follows "
                f"{previous.text!r} {previous.start:g} to {previous.end:g} s"
            )
        words.append(word)
    return tuple(words)


def _check_words_in_text(words: Sequence[Word], text: str) -> None:
    end = 0
    for index, word in enumerate(words):
        start = text.find(word.text, end)
        if start < 0:
            raise MossError(f"words[{index}]: {word.text!r} is not in the text, in this order")
        end = start + len(word.text)


def _excerpt(value: Any) -> str:
    """A JSON value for an error message, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

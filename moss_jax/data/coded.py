"""Manifests with codes in place of recordings: each recording is encoded once, however many lines name it.

`moss-jax tokenize` encodes the recordings of each line of one manifest; where lines or manifests share recordings, this
saves most of that work.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_jax.audio import MAX_BYTES, read_audio, resample
from moss_jax.documents import code_list, located, parse_object, read_lines, read_text, shown
from moss_jax.errors import MossError
from moss_jax.files import folder_lock, is_file, write_text
from moss_jax.progress import Say, silent

CODES_FILE = "codes.jsonl"
ENCODE_GROUP = 64  # recordings that are read and encoded together


def encode_manifests(
    manifests: Sequence[str | Path],
    model: str | Path,
    out: str | Path,
    say: Say = silent,
    max_audio_bytes: int = MAX_BYTES,
) -> None:
    """Writes OUT/NAME.jsonl for each manifest, with "codes" in place of "audio". The same call resumes an interrupted
    one.

    Args:
        manifests: JSON lines (`moss_jax.data.manifest`), of different names. Recordings in tar files are not encoded.
        model: a system folder; its speech tokenizer is used.
        out: a folder; codes.jsonl in it holds the codes of every recording.
        max_audio_bytes: the most decoded bytes of one recording (`moss_jax.audio.read_audio`).

    Raises:
        MossError: a manifest or a recording cannot be read, two manifests have the same name, OUT/codes.jsonl is of
            another speech tokenizer, or another process is writing to OUT.
    """
    from moss_jax.checkpoint.system_folder import SystemFolder

    paths = [Path(path) for path in manifests]
    out = Path(out)
    if len({path.name for path in paths}) < len(paths):
        raise MossError(f"manifests: {', '.join(map(str, paths))} do not have different names")
    entries = {path: _read_entries(path) for path in paths}
    recordings = list(dict.fromkeys(recording for path in paths for recording in _recordings(path, entries[path])))
    tokenizer_folder = SystemFolder(model).component_folder("speech_tokenizer")
    with folder_lock(out):
        codes = _encode(recordings, tokenizer_folder, out / CODES_FILE, say, max_audio_bytes)
        for path in paths:
            lines = [json.dumps(_with_codes(path, entry, codes), ensure_ascii=False) for entry in entries[path]]
            write_text(out / path.name, "".join(f"{line}\n" for line in lines))


def _encode(
    recordings: Sequence[str], tokenizer_folder: Path, journal_path: Path, say: Say, max_audio_bytes: int
) -> Mapping[str, list[int]]:
    """The codes of each recording; those that are not in the journal are computed and added to it."""
    from moss_jax.speech_tokenizer.encode import SpeechTokenizer

    journal = _CodesJournal(journal_path, _folder_digest(tokenizer_folder))
    missing = [recording for recording in recordings if recording not in journal.codes]
    if not missing:
        return journal.codes
    # Recordings of similar length are padded least when encoded together; the size of a file is a guess of its length.
    missing.sort(key=lambda recording: Path(recording).stat().st_size if Path(recording).is_file() else 0)
    tokenizer = SpeechTokenizer.load(tokenizer_folder)
    done = len(recordings) - len(missing)
    for first in range(0, len(missing), ENCODE_GROUP):
        group = missing[first : first + ENCODE_GROUP]
        waves = []
        for path in group:
            recording = read_audio(path, max_bytes=max_audio_bytes)
            waves.append(resample(recording.wave, recording.rate, tokenizer.config.sample_rate))
            for notice in recording.notices:
                say(f"note: {notice}")
        encoded = tokenizer.encode(waves)
        journal.append({path: codes.tolist() for path, codes in zip(group, encoded, strict=True)})
        done += len(group)
        say(f"encoded {done} of {len(recordings)} recordings")
    return journal.codes


class _CodesJournal:
    """codes.jsonl: the first line names the speech tokenizer, each other line has the codes of a recording.

    An incomplete last line, of a process that was killed, is dropped.

    Attributes:
        codes: of each recording, by absolute path.
    """

    def __init__(self, path: Path, tokenizer_digest: str):
        self.path = path
        self.codes: dict[str, list[int]] = {}
        complete = ""
        if path.exists():
            text = read_text(path)
            complete = text[: text.rfind("\n") + 1]
        with located(path):
            entries = [parse_object(line) for line in complete.split("\n") if line]
            if entries and entries[0] != {"speech_tokenizer": tokenizer_digest}:
                raise MossError("codes of another speech tokenizer; choose another folder")
            for entry in entries[1:]:
                if not isinstance(entry.get("audio"), str):
                    raise MossError("damaged; choose another folder")
                self.codes[entry["audio"]] = code_list(entry.get("codes"))
        write_text(path, complete or json.dumps({"speech_tokenizer": tokenizer_digest}) + "\n")

    def append(self, codes: Mapping[str, list[int]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for recording, recording_codes in codes.items():
                file.write(json.dumps({"audio": recording, "codes": recording_codes}) + "\n")
        self.codes.update(codes)


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _read_entries(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in read_lines(path):
        with located(f"{path} line {line.number}"):
            entry = parse_object(line.content)
            turns = entry.get("turns", [entry])
            if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
                raise MossError(f"turns is {shown(turns)}, expected a list of turns")
            for part in _parts_with_audio(entry):
                audio = part["audio"]
                if not isinstance(audio, str) or not is_file(path.parent / audio):
                    raise MossError(f"audio {shown(audio)}: no such file")
        entries.append(entry)
    return entries


def _parts_with_audio(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entry itself or its turns, where these name an audio file (not a member of a tar file)."""
    yield from (part for part in entry.get("turns", [entry]) if "audio" in part and "shard" not in part)


def _recordings(path: Path, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        yield from (os.path.abspath(path.parent / part["audio"]) for part in _parts_with_audio(entry))


def _with_codes(path: Path, entry: dict[str, Any], codes: Mapping[str, list[int]]) -> dict[str, Any]:
    for part in _parts_with_audio(entry):
        part["codes"] = codes[os.path.abspath(path.parent / part.pop("audio"))]
    return entry

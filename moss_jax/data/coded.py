"""Manifests whose recordings have become codes: each recording is encoded once, however many lines name it.

`moss-jax tokenize` encodes the recordings of each line; where lines and formats share them this saves most of it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_jax.audio import MAX_BYTES, read_audio, resample
from moss_jax.checkpoint import write_text
from moss_jax.documents import code_list, located, parse_object, read_lines, read_text, shown
from moss_jax.errors import MossError
from moss_jax.files import folder_lock, is_file

CODES = "codes.jsonl"
GROUP = 64  # recordings that are read and encoded together
Say = Callable[[str], None]


def encode_manifests(
    manifests: Sequence[str | Path],
    model: str | Path,
    out: str | Path,
    say: Say = lambda line: None,
    max_audio_bytes: int = MAX_BYTES,
) -> None:
    """Writes OUT/NAME.jsonl for each manifest, with "codes" in the place of "audio". Killed, the same call goes on.

    Args:
        manifests: JSON lines (`moss_jax.data.manifest`) of different names; recordings in tar files stay as they are.
        model: a system folder; its speech tokenizer is used.
        out: a folder; codes.jsonl in it holds the codes of every recording.
        max_audio_bytes: the most decoded samples of one recording (`moss_jax.audio.read_audio`).

    Raises:
        MossError: a manifest or a recording cannot be read, two manifests have one name, OUT/codes.jsonl is of another
            speech tokenizer, or another process is writing to OUT.
    """
    from moss_jax.checkpoint.system_folder import SystemFolder

    paths = [Path(path) for path in manifests]
    out = Path(out)
    if len({path.name for path in paths}) < len(paths):
        raise MossError(f"manifests: {', '.join(map(str, paths))} do not have different names")
    lines = {path: _lines(path) for path in paths}
    wanted = list(dict.fromkeys(place for path in paths for place in _recordings(path, lines[path])))
    component_folder = SystemFolder(model).component_folder("speech_tokenizer")
    with folder_lock(out):
        _encode(paths, lines, wanted, component_folder, out, say, max_audio_bytes)


def _encode(
    paths: Sequence[Path],
    lines: Mapping[Path, list[dict[str, Any]]],
    wanted: Sequence[str],
    component_folder: Path,
    out: Path,
    say: Say,
    max_audio_bytes: int,
) -> None:
    from moss_jax.speech_tokenizer.encode import SpeechTokenizer

    codes = _Journal(out / CODES, _mark(component_folder))
    left = [place for place in wanted if place not in codes.known]
    # Neighbours in length share a bucket; the size of a file tells it.
    left.sort(key=lambda place: Path(place).stat().st_size if Path(place).is_file() else 0)
    tokenizer = SpeechTokenizer.load(component_folder) if left else None
    for first in range(0, len(left), GROUP):
        group = left[first : first + GROUP]
        waves = []
        for place in group:
            recording = read_audio(place, max_bytes=max_audio_bytes)
            waves.append(resample(recording.wave, recording.rate, tokenizer.config.sample_rate))
            for notice in recording.notices:
                say(f"note: {notice}")
        codes.append({place: found.tolist() for place, found in zip(group, tokenizer.encode(waves), strict=True)})
        say(f"encoded {len(wanted) - len(left) + first + len(group)} of {len(wanted)} recordings")
    for path in paths:
        coded = [json.dumps(_coded(path, line, codes.known), ensure_ascii=False) for line in lines[path]]
        write_text(out / path.name, "".join(f"{line}\n" for line in coded))


class _Journal:
    """Codes of recordings, a line each; the first line says of which speech tokenizer. A line cut off is lost."""

    def __init__(self, path: Path, mark: str):
        self.path = path
        self.known = {}
        whole = ""
        if path.exists():
            text = read_text(path)
            whole = text[: text.rfind("\n") + 1]
        with located(path):
            found = [parse_object(line) for line in whole.split("\n") if line]
            if found and found[0] != {"speech_tokenizer": mark}:
                raise MossError("codes of another speech tokenizer; choose another folder")
            for line in found[1:]:
                if not isinstance(line.get("audio"), str):
                    raise MossError("damaged; choose another folder")
                self.known[line["audio"]] = code_list(line.get("codes"))
        write_text(path, whole or json.dumps({"speech_tokenizer": mark}) + "\n")

    def append(self, codes: dict[str, list[int]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"audio": place, "codes": found}) + "\n" for place, found in codes.items())
        self.known |= codes


def _mark(component_folder: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(component_folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _lines(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in read_lines(path):
        with located(f"{path} line {line.number}"):
            entry = parse_object(line.content)
            parts = entry.get("turns", [entry])
            if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
                raise MossError(f"turns is {shown(parts)}, expected a list of turns")
            for part in _spoken(entry):
                audio = part["audio"]
                if not isinstance(audio, str) or not is_file(path.parent / audio):
                    raise MossError(f"audio {shown(audio)}: no such file")
        entries.append(entry)
    return entries


def _spoken(line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The line itself or its turns, those that name a recording of their own."""
    yield from (part for part in line.get("turns", [line]) if "audio" in part and "shard" not in part)


def _recordings(path: Path, lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    for line in lines:
        yield from (os.path.abspath(path.parent / part["audio"]) for part in _spoken(line))


def _coded(path: Path, line: dict[str, Any], codes: dict[str, list[int]]) -> dict[str, Any]:
    for part in _spoken(line):
        part["codes"] = codes[os.path.abspath(path.parent / part.pop("audio"))]
    return line

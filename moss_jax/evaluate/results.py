"""Results of an evaluation, one line per item, so that an interrupted evaluation can be resumed; and tables."""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.documents import parse_json
from moss_jax.errors import MossError
from moss_jax.files import write_text

RESULTS_FORMAT = "moss-jax-eval-1"
RESULTS_FILE = "results.jsonl"
TABLE_STEM = "table"  # table.md and table.json
Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


class Results:
    """The file `FOLDER/results.jsonl`: a line about the evaluation, then one for each finished item.

    An incomplete last line is removed, and its item is evaluated again.

    Attributes:
        folder: of the results.
        done: {id: record} of the finished items.

    Args:
        folder: created if it does not exist.
        about: what the results depend on (task, file, model, settings), as JSON values.

    Raises:
        MossError: the folder has results of another evaluation, is in use, is damaged, or cannot be written.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._path = self.folder / RESULTS_FILE
        about = json.loads(json.dumps({"format": RESULTS_FORMAT, **about}))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
            self._lock()
            self._file.seek(0)
            content = self._file.read()
        except OSError as error:
            raise MossError(f"{self._path}: cannot be written ({error.strerror or error})") from error
        try:
            self._load(content, about)
        except BaseException:
            self._file.close()
            raise

    def _load(self, content: bytes, about: Mapping[str, Any]) -> None:
        """Reads the finished items and removes an incomplete last line; or starts a new file."""
        complete = content[: content.rfind(b"\n") + 1]
        lines = [self._parse(number, line) for number, line in enumerate(complete.split(b"\n")[:-1], 1)]
        if lines:
            self._check(lines[0], about)
        self.done: dict[str, dict[str, Any]] = {line["id"]: line for line in lines[1:]}
        self._file.truncate(len(complete))
        if not lines:
            self._write([about])

    def _lock(self) -> None:
        """Keeps other processes from writing to the file; the lock ends with the process."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MossError(
                f"{self._path}: another evaluation is writing it; wait for it or choose another folder"
            ) from None

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds finished items, each with its "id"; they are on the disk when this returns."""
        self._write(records)
        self.done |= {record["id"]: dict(record) for record in records}

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        try:
            self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise MossError(
                f"{self._path}: cannot be written ({error.strerror or error}); run the same command again to resume"
            ) from error

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = parse_json(line, finite=False)
        except MossError:
            record = None
        key = "format" if number == 1 else "id"
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise MossError(f"{self._path} line {number}: damaged; choose another folder")
        return record

    def _check(self, stored: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Raises MossError if the results in the file depend on other things."""
        differing = [key for key in {**about, **stored} if stored.get(key) != about.get(key)]
        if differing:
            values = "; ".join(f"{key}: there {stored.get(key)!r}, now {about.get(key)!r}" for key in differing)
            raise MossError(f"{self._path}: results of another evaluation ({values}); choose another folder")


def file_hash(path: str | Path) -> str:
    """A hash of the contents of a file, or of the files in a folder."""
    path = Path(path)
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion."""
    if not count:
        return 0.0, 1.0
    share = correct / count
    square = Z95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return (0.0 if not correct else middle - half), (1.0 if correct == count else middle + half)


def ratio_interval(parts: Sequence[float], wholes: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95% bootstrap interval of sum(parts) / sum(wholes), over items; the random draws are always the same."""
    numerators = np.asarray(parts, float)
    denominators = np.asarray(wholes, float)
    samples = np.random.default_rng(0).integers(0, len(numerators), (draws, len(numerators)))
    sums = denominators[samples].sum(1)
    low, high = np.quantile(numerators[samples].sum(1) / np.where(sums, sums, 1), (0.025, 0.975))
    return float(low), float(high)


def accuracy_row(name: str, right: Sequence[bool]) -> dict[str, Any]:
    """A row of a table of accuracies, in percent."""
    count = len(right)
    correct = int(sum(right))
    low, high = wilson_interval(correct, count)
    share = correct / count if count else 0.0
    return {
        "what": name,
        "items": count,
        "right": correct,
        "accuracy %": _percent(share),
        "95% from": _percent(low),
        "95% to": _percent(high),
    }


def word_error_row(name: str, errors: Sequence[int], words: Sequence[int]) -> dict[str, Any]:
    """A row of a table of word error rates, in percent."""
    low, high = ratio_interval(errors, words)
    rate = sum(errors) / max(sum(words), 1)
    return {
        "what": name,
        "items": len(errors),
        "words": int(sum(words)),
        "WER %": _percent(rate),
        "95% from": _percent(low),
        "95% to": _percent(high),
    }


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows that have the same keys."""
    header = list(rows[0])
    rule = ["---" if isinstance(value, str) else "---:" for value in rows[0].values()]
    lines = [header, rule, *([str(row[key]) for key in header] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> str:
    """Writes table.md and table.json; returns the text of table.md."""
    text = "\n\n".join([markdown_table(rows), *notes]) + "\n"
    write_text(folder / f"{TABLE_STEM}.md", text)
    write_text(folder / f"{TABLE_STEM}.json", json.dumps({"rows": list(rows), "notes": list(notes)}, indent=1) + "\n")
    return text


def _percent(share: float) -> float:
    return round(100 * share, 2)

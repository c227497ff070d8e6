"""Files of evaluation items: JSON lines. All that is wrong with a file is reported at once, by line number."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moss_jax.errors import MossError

Item = TypeVar("Item")  # has a `name`, unlike every other one in its file


def read_items(path: str | Path, parse: Callable[[dict[str, Any], str, Path], Item]) -> list[Item]:
    """The items of a file of JSON lines; empty lines are skipped.

    Args:
        path: the file. What it names (recordings) is looked for beside it.
        parse: (entry without its "id", name, folder of the file) -> item; raises MossError.

    Raises:
        MossError: every line that is wrong, with its number; or no line at all.
    """
    path = Path(path)
    return collect(path, ((number, lambda text=text: _object(text)) for number, text in _lines(path)), parse)


def collect(
    path: Path,
    entries: Iterable[tuple[int, Callable[[], dict[str, Any]]]],
    parse: Callable[[dict[str, Any], str, Path], Item],
) -> list[Item]:
    """Items of (line number, function that gives the entry or raises MossError); see `read_items`."""
    items: dict[str, Item] = {}
    problems = []
    for number, entry in entries:
        try:
            fields = entry()
            name = str(fields.pop("id", f"{number:05d}"))
            if Path(name).name != name or name.startswith("."):
                raise MossError(f"id {name!r} is no plain file name")
            if name in items:
                raise MossError(f"the id {name!r} is there twice")
            items[name] = parse(fields, name, path.parent)
        except MossError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise MossError("\n  ".join([f"{path}: {len(problems)} lines are wrong", *problems]))
    if not items:
        raise MossError(f"{path}: holds no item, expected a JSON object a line")
    return list(items.values())


def read_text(path: Path) -> str:
    """A UTF-8 file (a byte order mark is dropped); raises MossError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MossError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MossError(f"{path}: cannot be read ({error})") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, line


def _object(text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MossError(f"not JSON ({error}), expected an object") from error
    if not isinstance(entry, dict):
        raise MossError(f"is a JSON {type(entry).__name__}, expected an object")
    return entry


@dataclass(frozen=True)
class Part:
    """What is said in one stretch: exactly one of `text`, `audio` (a file) and `codes`."""

    text: str | None = None
    audio: Path | None = None
    codes: tuple[int, ...] | None = None


def read_part(entry: Any, folder: Path, what: str, code_count: int | None = None) -> Part:
    """A part from JSON: a string is text; else {"text": ...}, {"audio": FILE} or {"codes": [...]}.

    Codes are below `code_count`, where it is given.
    """
    if isinstance(entry, str):
        entry = {"text": entry}
    kinds = ("text", "audio", "codes")
    if not isinstance(entry, Mapping) or len(entry) != 1 or next(iter(entry)) not in kinds:
        raise MossError(f'{what}: expected a string, {{"text": ...}}, {{"audio": FILE}} or {{"codes": [...]}}')
    ((kind, value),) = entry.items()
    if kind == "codes":
        if not isinstance(value, list) or not value or not all(type(code) is int and code >= 0 for code in value):
            raise MossError(f"{what}: codes: expected a list of whole numbers from 0, at least one")
        if code_count is not None and max(value) >= code_count:
            raise MossError(f"{what}: {max(value)} is not a speech code, expected 0 to {code_count - 1}")
        return Part(codes=tuple(value))
    if not isinstance(value, str) or not value.strip():
        raise MossError(f"{what}: {kind} is {value!r}, expected some words")
    if kind == "text":
        return Part(text=value)
    if not (folder / value).is_file():
        raise MossError(f"{what}: audio {value}: no such file")
    return Part(audio=folder / value)


def need(entry: Mapping[str, Any], fields: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raises MossError unless `entry` has these fields, and no others than these and the optional ones."""
    if missing := [field for field in fields if field not in entry]:
        raise MossError(f"lacks {', '.join(missing)}")
    if unknown := sorted(set(entry) - {*fields, *optional}):
        raise MossError(f"unknown: {', '.join(unknown)}; expected {', '.join([*fields, *optional, 'id'])}")


def need_string(entry: Mapping[str, Any], field: str, default: str | None = None) -> str:
    """A string of at least one visible character."""
    value = entry.get(field, default)
    if not isinstance(value, str) or not value.strip():
        raise MossError(f"{field} is {value!r}, expected a string that is not empty")
    return value


@dataclass(frozen=True)
class Sentence:
    """A recording (or its codes) with its transcript."""

    name: str
    text: str
    speech: Part


def read_sentences(path: str | Path, code_count: int | None = None) -> list[Sentence]:
    """A file of {"audio": FILE or "codes": [...], "text": ..., optional "id"}; other fields are not looked at, so that
    a manifest of training data can be read."""

    def parse(entry: dict[str, Any], name: str, folder: Path) -> Sentence:
        speech = {kind: entry[kind] for kind in ("audio", "codes") if kind in entry}
        if len(speech) != 1:
            raise MossError("expected exactly one of audio and codes beside text")
        return Sentence(name, need_string(entry, "text"), read_part(speech, folder, "speech", code_count))

    return read_items(path, parse)

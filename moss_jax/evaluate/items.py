"""Reads files of evaluation items, in JSON lines. All wrong lines of a file are reported at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from moss_jax.documents import parse_object, plain_name, read_lines, short, shown
from moss_jax.errors import MossError
from moss_jax.files import is_file

Item = TypeVar("Item")  # has a `name` that is unique in its file


def read_items(path: str | Path, parse: Callable[[dict[str, Any], str, Path], Item]) -> list[Item]:
    """The items of a file of JSON lines; empty lines are skipped.

    Args:
        path: the file; recordings that it names are relative to its folder.
        parse: (entry without its "id", name, folder of the file) -> item; raises MossError.

    Raises:
        MossError: the list of wrong lines with their numbers, or there is no line.
    """
    path = Path(path)
    entries = ((line.number, partial(parse_object, line.content)) for line in read_lines(path))
    return collect_items(path, entries, parse)


def collect_items(
    path: Path,
    entries: Iterable[tuple[int, Callable[[], dict[str, Any]]]],
    parse: Callable[[dict[str, Any], str, Path], Item],
) -> list[Item]:
    """Items from (line number, function that returns the entry or raises MossError) pairs; see `read_items`."""
    items: dict[str, Item] = {}
    problems = []
    for number, entry in entries:
        try:
            fields = entry()
            name = plain_name(fields.pop("id", f"{number:05d}"))
            if name in items:
                raise MossError(f"the id {shown(name)} is used twice")
            items[name] = parse(fields, name, path.parent)
        except MossError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise MossError("\n  ".join([f"{path}: {len(problems)} lines are wrong", *problems]))
    if not items:
        raise MossError(f"{path}: contains no item, expected one JSON object on each line")
    return list(items.values())


@dataclass(frozen=True)
class ContentPart:
    """Text or speech: exactly one of `text`, `audio` (a file) and `codes`."""

    text: str | None = None
    audio: Path | None = None
    codes: tuple[int, ...] | None = None


def read_part(entry: Any, folder: Path, what: str, code_count: int | None = None) -> ContentPart:
    """A content part from JSON: a string (text), {"text": ...}, {"audio": FILE} or {"codes": [...]}.

    Args:
        folder: file names are relative to it.
        what: start of error messages.
        code_count: codes must be below it; None: any.

    Raises:
        MossError: another structure, an empty text, a wrong code, or a file that does not exist.
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
        return ContentPart(codes=tuple(value))
    if not isinstance(value, str) or not value.strip():
        raise MossError(f"{what}: {kind} is {shown(value)}, expected a string that is not empty")
    if kind == "text":
        return ContentPart(text=value)
    if not is_file(folder / value):
        raise MossError(f"{what}: audio {short(value)}: no such file")
    return ContentPart(audio=folder / value)


def need(entry: Mapping[str, Any], fields: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raises MossError unless `entry` has all these fields, and no others than these and the optional ones."""
    if missing := [field for field in fields if field not in entry]:
        raise MossError(f"lacks {', '.join(missing)}")
    if unknown := sorted(set(entry) - {*fields, *optional}):
        raise MossError(f"unknown: {', '.join(map(short, unknown))}; expected {', '.join([*fields, *optional, 'id'])}")


def need_string(entry: Mapping[str, Any], field: str, default: str | None = None) -> str:
    """A field that is a string with at least one visible character. Raises MossError if it is not."""
    value = entry.get(field, default)
    if not isinstance(value, str) or not value.strip():
        raise MossError(f"{field} is {shown(value)}, expected a string that is not empty")
    return value


@dataclass(frozen=True)
class Sentence:
    """A recording, or its codes, with its transcript."""

    name: str
    text: str
    speech: ContentPart


def read_sentences(path: str | Path, code_count: int | None = None) -> list[Sentence]:
    """Reads a file of {"audio": FILE or "codes": [...], "text": ..., optional "id"}.

    Other fields are ignored, so that manifests of training data can be read.
    """

    def parse(entry: dict[str, Any], name: str, folder: Path) -> Sentence:
        speech = {kind: entry[kind] for kind in ("audio", "codes") if kind in entry}
        if len(speech) != 1:
            raise MossError("expected exactly one of audio and codes in addition to text")
        return Sentence(name, need_string(entry, "text"), read_part(speech, folder, "speech", code_count))

    return read_items(path, parse)

"""Config dataclasses <-> config.json. Our own files are read strictly: what is not understood is an error."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from moss_jax.documents import shown
from moss_jax.errors import MossError

T = TypeVar("T")
ADDED_LATER = {"added": True}  # metadata of a field that older files lack; its default is what they meant
MAX_INT = 2**63 - 1
MAX_SIZE = 2**24  # of a width, a vocabulary, a context or a rate
MAX_LAYERS = 1000
MAX_PROBLEMS = 50  # listed in one message


def within(low: float, high: float, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field for which `read_config` allows numbers from `low` to `high`, also inside lists."""
    return dataclasses.field(default=default, metadata={"range": (low, high)})


def read_config(cls: type[T], data: Mapping[str, Any], where: str | Path, *, foreign: bool = False) -> T:
    """A config dataclass from the JSON object that `write_config` made of one.

    Nested dataclasses, tuples (JSON arrays), optional fields and whole numbers in float fields are understood. A
    `check()` method of the dataclass, or its `__post_init__`, may raise ValueError for fields that contradict each
    other.

    Args:
        foreign: the file is of another program. Fields that `cls` does not have are ignored, and a field that is
            missing takes its default where it has one.

    Raises:
        MossError: every unknown, missing or wrongly typed field at once, every number that is out of range or not
            finite, or the contradiction, with `where` in front.
    """
    problems: list[str] = []
    fields = _fields(cls, data, "", problems, foreign)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        what = "" if foreign else f"not a {cls.__name__}, "
        raise MossError("\n  ".join([f"{where}: {what}{problems[0]}{more}", *problems[1:MAX_PROBLEMS]]))
    try:
        config = _build(cls, fields)
    except ValueError as error:
        raise MossError(f"{where}: {error}") from error
    return config


def write_config(config: Any) -> dict[str, Any]:
    """The JSON object of a config dataclass: its fields, nothing else."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def check_sizes(config: Any, name: str, *, zero: Collection[str] = (), layers: Collection[str] = ()) -> None:
    """Checks every whole number of a model's config, also those in tuples, against what a model can have.

    Args:
        config: a dataclass.
        name: opens the message.
        zero: fields that may be 0; the others are at least 1.
        layers: fields that count layers, at most MAX_LAYERS; the others are at most MAX_SIZE.

    Raises:
        MossError: the first number outside its range.
    """
    for entry in dataclasses.fields(config):
        least = int(entry.name not in zero)
        most = MAX_LAYERS if entry.name in layers else MAX_SIZE
        for value in _numbers(getattr(config, entry.name)):
            if value < least:
                raise MossError(f"{name} config: {entry.name} is {value}, expected at least {least}")
            if value > most:
                raise MossError(f"{name} config: {entry.name} is {value}, expected at most {most}")


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _fields(cls: type, data: Any, prefix: str, problems: list[str], foreign: bool) -> dict[str, Any]:
    """Checks `data` against the fields of `cls` and returns keyword arguments for `_build`."""
    if not isinstance(data, Mapping):
        problems.append(f"wrong type: {prefix.rstrip('.') or 'the config'} is {_name(data)}, expected an object")
        return {}
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    optional = {name for name, field in known.items() if field.metadata.get("added") or (foreign and _default(field))}
    if not foreign:
        problems += [f"unknown: {prefix}{key}" for key in data if key not in known]
    problems += [f"missing: {prefix}{key}" for key in known if key not in optional and key not in data]
    fields = {}
    for name, field in known.items():
        if name in data:
            before = len(problems)
            fields[name] = _value(hints[name], data[name], prefix + name, problems, foreign)
            if "range" in field.metadata and len(problems) == before:
                low, high = field.metadata["range"]
                _check_range(fields[name], low, high, prefix + name, problems)
    return fields


def _default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _check_range(value: Any, low: float, high: float, where: str, problems: list[str]) -> None:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_range(item, low, high, f"{where}[{index}]", problems)
    elif value is not None and not low <= value <= high:
        problems.append(f"out of range: {where} is {shown(value)}, expected {low} to {high}")


def _value(hint: Any, value: Any, where: str, problems: list[str], foreign: bool) -> Any:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where, problems, foreign)
    if dataclasses.is_dataclass(hint):
        return (hint, _fields(hint, value, where + ".", problems, foreign))
    if hint is tuple or origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"wrong type: {where} is {_name(value)}, expected a list")
            return ()
        if not arguments:
            return tuple(value)
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        elif len(arguments) != len(value):
            problems.append(f"wrong length: {where} has {len(value)} entries, expected {len(arguments)}")
            return ()
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(_value(inner, item, f"{where}[{i}]", problems, foreign) for i, (inner, item) in pairs)
    if origin is typing.Literal:
        if value not in arguments:
            problems.append(
                f"wrong value: {where} is {shown(value)}, expected one of {', '.join(map(repr, arguments))}"
            )
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_INT:
        value = float(value)
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if not right:
        expected = "an object" if hint is dict else hint.__name__
        problems.append(f"wrong type: {where} is {_name(value)}, expected {expected}")
    elif hint is int and abs(value) > MAX_INT:
        problems.append(f"out of range: {where} is {shown(value)}, expected at most {MAX_INT}")
    elif hint is float and not math.isfinite(value):
        problems.append(f"out of range: {where} is {value}, expected a finite number")
    return value


def _build(cls: type, fields: dict[str, Any]) -> Any:
    config = cls(**{key: _unwrap(value) for key, value in fields.items()})
    if hasattr(config, "check"):
        config.check()
    return config


def _unwrap(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and dataclasses.is_dataclass(value[0]):
        return _build(*value)
    return tuple(map(_unwrap, value)) if isinstance(value, tuple) else value


def _name(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {shown(value)}"

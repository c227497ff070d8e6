"""Config dataclasses to config.json and back. Files of this package are read strictly: an unknown field is an error.

Versions: a config file has no version number. A field that is added to a config later declares
`metadata=ADDED_LATER` and a default that gives the behaviour of the versions before it; in the files of those versions
it is missing, and the default is used. Any other missing field is an error. Fields are never renamed or removed.
"""

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
ADDED_LATER = {"added_later": True}  # metadata of a field that may be missing in a file, see the module's docstring
MAX_INT = 2**63 - 1
MAX_SIZE = 2**24  # of a width, a vocabulary, a context or a rate
MAX_LAYERS = 1000
MAX_PROBLEMS = 50  # listed in one message


def within(low: float, high: float, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field for which `read_config` accepts numbers from `low` to `high`, also inside lists."""
    return dataclasses.field(default=default, metadata={"range": (low, high)})


def read_config(cls: type[T], data: Mapping[str, Any], where: str | Path, *, foreign: bool = False) -> T:
    """A config dataclass from the JSON object that `write_config` made of one.

    Supported are nested dataclasses, tuples (JSON arrays), optional fields, and whole numbers in float fields. A
    `check()` method of the dataclass, or its `__post_init__`, may raise ValueError for fields that contradict each
    other.

    Args:
        where: the start of the message, usually the file.
        foreign: the file was written by another program. Then fields that `cls` does not have are ignored, and every
            field with a default may be missing.

    Raises:
        MossError: all unknown, missing and wrongly typed fields and all numbers that are out of range or not finite at
            once, or else the contradiction.
    """
    problems: list[str] = []
    fields = _fields(cls, data, "", problems, foreign)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        what = "" if foreign else f"not a {cls.__name__}, "
        raise MossError("\n  ".join([f"{where}: {what}{problems[0]}{more}", *problems[1:MAX_PROBLEMS]]))
    try:
        config: T = _build(_Nested(cls, fields))
    except ValueError as error:
        raise MossError(f"{where}: {error}") from error
    return config


def write_config(config: Any) -> dict[str, Any]:
    """The JSON object of a config dataclass: its fields and nothing else."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def check_sizes(config: Any, name: str, *, zero: Collection[str] = (), layers: Collection[str] = ()) -> None:
    """Checks that every whole number of a model's config, also those in tuples, is a possible size.

    Args:
        config: a dataclass.
        name: of the model, the start of the message.
        zero: fields that may be 0; the minimum of all others is 1.
        layers: fields that count layers, whose maximum is MAX_LAYERS; that of all others is MAX_SIZE.

    Raises:
        MossError: a number is out of its range; the first one is reported.
    """
    for entry in dataclasses.fields(config):
        minimum = 0 if entry.name in zero else 1
        maximum = MAX_LAYERS if entry.name in layers else MAX_SIZE
        for value in _numbers(getattr(config, entry.name)):
            if value < minimum:
                raise MossError(f"{name} config: {entry.name} is {value}, expected at least {minimum}")
            if value > maximum:
                raise MossError(f"{name} config: {entry.name} is {value}, expected at most {maximum}")


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers in a value and in the tuples in it."""
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


@dataclasses.dataclass(frozen=True)
class _Nested:
    """A dataclass that has been checked but not built yet."""

    cls: Any
    fields: dict[str, Any]


def _fields(cls: Any, data: Any, prefix: str, problems: list[str], foreign: bool) -> dict[str, Any]:
    """The checked values of the fields of `cls` in `data`; what is wrong is added to `problems`."""
    if not isinstance(data, Mapping):
        problems.append(f"wrong type: {prefix.rstrip('.') or 'the config'} is {_name(data)}, expected an object")
        return {}
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    optional = {
        name for name, field in known.items() if "added_later" in field.metadata or (foreign and _has_default(field))
    }
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


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _check_range(value: Any, low: float, high: float, where: str, problems: list[str]) -> None:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_range(item, low, high, f"{where}[{index}]", problems)
    elif value is not None and not low <= value <= high:
        problems.append(f"out of range: {where} is {shown(value)}, expected {low} to {high}")


def _value(hint: Any, value: Any, where: str, problems: list[str], foreign: bool) -> Any:
    """`value` checked against a type hint; nested dataclasses become _Nested."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # `X | None`
        if value is None and type(None) in arguments:
            return None
        inner = next(argument for argument in arguments if argument is not type(None))
        return _value(inner, value, where, problems, foreign)
    if dataclasses.is_dataclass(hint):
        return _Nested(hint, _fields(hint, value, where + ".", problems, foreign))
    if hint is tuple or origin is tuple:
        return _tuple(arguments, value, where, problems, foreign)
    if origin is typing.Literal:
        if value not in arguments:
            problems.append(
                f"wrong value: {where} is {shown(value)}, expected one of {', '.join(map(repr, arguments))}"
            )
        return value
    if origin is dict:  # its keys and values are not checked
        hint = dict
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_INT:
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):  # a bool is an int in Python
        expected = "an object" if hint is dict else hint.__name__
        problems.append(f"wrong type: {where} is {_name(value)}, expected {expected}")
    elif hint is int and abs(value) > MAX_INT:
        problems.append(f"out of range: {where} is {shown(value)}, expected at most {MAX_INT}")
    elif hint is float and not math.isfinite(value):
        problems.append(f"out of range: {where} is {value}, expected a finite number")
    return value


def _tuple(arguments: tuple[Any, ...], value: Any, where: str, problems: list[str], foreign: bool) -> tuple[Any, ...]:
    """`value` checked against `tuple[arguments]`; no arguments: any items."""
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
    pairs = zip(arguments, value, strict=True)
    return tuple(
        _value(inner, item, f"{where}[{index}]", problems, foreign) for index, (inner, item) in enumerate(pairs)
    )


def _build(value: Any) -> Any:
    """A checked value with every _Nested in it built."""
    if isinstance(value, tuple):
        return tuple(map(_build, value))
    if not isinstance(value, _Nested):
        return value
    config = value.cls(**{name: _build(field) for name, field in value.fields.items()})
    if hasattr(config, "check"):
        config.check()
    return config


def _name(value: Any) -> str:
    """A value and its type, for a message."""
    return "null" if value is None else f"{type(value).__name__} {shown(value)}"

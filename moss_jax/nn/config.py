"""Config dataclasses <-> config.json. Our own files are read strictly: what is not understood is an error."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from moss_jax.errors import MossError

T = TypeVar("T")
ADDED = {"added": True}  # metadata of a field that older files lack; its default is what they meant


def read_config(cls: type[T], data: Mapping[str, Any], where: str | Path) -> T:
    """A config dataclass from the JSON object that `write_config` made of one.

    Nested dataclasses, tuples (JSON arrays), optional fields and whole numbers in float fields are understood. A
    `check()` method of the dataclass, or its `__post_init__`, may raise ValueError for fields that contradict each
    other.

    Raises:
        MossError: every unknown, missing or wrongly typed field at once, or the contradiction, with `where` in front.
    """
    problems: list[str] = []
    fields = _fields(cls, data, "", problems)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise MossError("\n  ".join([f"{where}: not a {cls.__name__}, {problems[0]}{more}", *problems[1:]]))
    try:
        config = _build(cls, fields)
    except ValueError as error:
        raise MossError(f"{where}: {error}") from error
    return config


def write_config(config: Any) -> dict[str, Any]:
    """The JSON object of a config dataclass: its fields, nothing else."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises MossError when there is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MossError(f"{path}: no such file") from None
    except OSError as error:
        raise MossError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise MossError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise MossError(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data


def _fields(cls: type, data: Any, prefix: str, problems: list[str]) -> dict[str, Any]:
    """Checks `data` against the fields of `cls` and returns keyword arguments for `_build`."""
    if not isinstance(data, Mapping):
        problems.append(f"wrong type: {prefix.rstrip('.') or 'the config'} is {_name(data)}, expected an object")
        return {}
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    added = {field.name for field in dataclasses.fields(cls) if field.metadata.get("added")}
    problems += [f"unknown: {prefix}{key}" for key in data if key not in known]
    problems += [f"missing: {prefix}{key}" for key in known - added - set(data)]
    return {key: _value(hints[key], data[key], prefix + key, problems) for key in known & set(data)}


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where, problems)
    if dataclasses.is_dataclass(hint):
        return (hint, _fields(hint, value, where + ".", problems))
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
        return tuple(_value(inner, item, f"{where}[{i}]", problems) for i, (inner, item) in pairs)
    if origin is typing.Literal:
        if value not in arguments:
            problems.append(f"wrong value: {where} is {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if not right:
        problems.append(f"wrong type: {where} is {_name(value)}, expected {hint.__name__}")
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
    return "null" if value is None else f"{type(value).__name__} {value!r}"

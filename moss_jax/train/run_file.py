"""Runs as files: Python configs, `--set NAME=VALUE`, and run.json in the folder of a run."""

import ast
import dataclasses
import json
import runpy
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_jax.checkpoint.config_io import read_config, write_config
from moss_jax.documents import read_json, shown
from moss_jax.errors import MossError
from moss_jax.files import is_file
from moss_jax.train.run import BaseRun
from moss_jax.train.run_folder import RUN_FILE
from moss_jax.train.tasks import DEFAULT_KIND, KINDS, run_class

# Fields by their former names, which run.json of older runs, configs and --set may still have.
RENAMED_FIELDS = {
    "average": "ema_decay",
    "guard.most": "guard.max_consecutive_skips",
}


def load_run(config: str | Path, assignments: Sequence[str] = ()) -> BaseRun:
    """Loads the run of a config file and applies `name=value` assignments. Raises MossError in one line."""
    path = Path(config)
    if not is_file(path):
        raise MossError(f"{path}: no such file, expected a config such as configs/stage1.py")
    try:
        run = runpy.run_path(str(path)).get("RUN")
    except MossError as error:
        raise MossError(f"{path}: {error}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else 1)
        raise MossError(f"{path} line {line}: {type(error).__name__}: {error}") from error
    if not isinstance(run, BaseRun):
        found = "nothing" if run is None else type(run).__name__
        raise MossError(f"{path}: sets RUN to {found}, expected a moss_jax.train.Run or another kind of run")
    return override(run, assignments)


def override(run: BaseRun, assignments: Sequence[str]) -> BaseRun:
    """The run with fields changed: "steps=100", "optimizer.learning_rate=1e-4", "data.seed=1".

    Values are parsed by the type of the field: numbers, true, false, none, plain strings; lists and dictionaries as
    Python literals. In a dictionary for a group of fields, missing fields take their defaults.
    When the schedule ends with the run, changing `steps` changes both.

    Raises:
        MossError: no such field (the existing ones are listed), a value of the wrong type, or fields that contradict
            each other.
    """
    values = write_config(run)
    names = set()
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise MossError(f"--set {assignment}: expected name=value")
        name = name.strip()
        name = RENAMED_FIELDS.get(name, name)
        names.add(name)
        _assign(type(run), values, name, text.strip())
    schedule_follows = run.steps == run.optimizer.total_steps and "optimizer.total_steps" not in names
    if "steps" in names and schedule_follows and isinstance(values["steps"], int):
        values["optimizer"]["total_steps"] = values["steps"]
    return read_config(type(run), values, "--set") if assignments else run


def read_run_values(folder: str | Path) -> dict[str, Any]:
    """The JSON object of the run in a folder, with its kind, and with current names for renamed fields."""
    path = Path(folder) / RUN_FILE
    if not is_file(path):
        raise MossError(f"{folder}: no {RUN_FILE} in it, expected the folder of a run")
    values = {"kind": DEFAULT_KIND, **_with_current_names(read_json(path))}
    if not isinstance(values["kind"], str):
        raise MossError(f"{path}: kind is {shown(values['kind'])}, expected one of {', '.join(KINDS)}")
    return values


def read_run(folder: str | Path) -> BaseRun:
    """The run in a folder. Raises MossError when there is none or its run.json cannot be read."""
    values = read_run_values(folder)
    return read_config(run_class(values.pop("kind")), values, str(Path(folder) / RUN_FILE))


def run_values(run: BaseRun) -> dict[str, Any]:
    """The run as a JSON object: its kind and its fields."""
    return {"kind": run.kind, **write_config(run)}


def run_text(run: BaseRun) -> str:
    """The content of run.json."""
    return json.dumps(run_values(run), indent=2) + "\n"


def _with_current_names(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields by their current names; a field that has both names keeps the value of the current one."""
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        path = RENAMED_FIELDS.get(prefix + key, prefix + key)
        name = path.rpartition(".")[2]
        if name != key and name in values:
            continue
        renamed[name] = _with_current_names(value, f"{path}.") if isinstance(value, dict) else value
    return renamed


def _assign(cls: type, values: dict[str, Any], name: str, text: str) -> None:
    """Sets the field `name`, such as "optimizer.learning_rate", in the JSON object of a run."""
    *parents, leaf = name.split(".")
    for i, parent in enumerate(parents):
        group = ".".join(parents[: i + 1])
        inner = _dataclass_of(_field_type(cls, parent, group, name))
        if inner is None:
            raise MossError(f"--set {name}: {group} has no fields")
        cls = inner
        values = values[parent]
        if values is None:
            raise MossError(
                f"--set {name}: {group} is none in this config; set it as a whole before, such as --set {group}={{}} "
                "for its defaults"
            )
    field_type = _field_type(cls, leaf, name, name)
    value = _parse(text, field_type)
    inner = _dataclass_of(field_type)
    if inner is not None and isinstance(value, dict):
        value = _with_defaults(inner, _with_current_names(value, f"{name}."))
    values[leaf] = value


def _with_defaults(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The given fields of a dataclass, and the defaults of the others."""
    types_by_name = typing.get_type_hints(cls)
    filled = dict(values)
    for field in dataclasses.fields(cls):
        if field.name not in filled:
            if field.default is not dataclasses.MISSING:
                default = field.default
            elif field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            else:
                continue  # read_config reports it as missing
            filled[field.name] = write_config(default) if dataclasses.is_dataclass(default) else default
        inner = _dataclass_of(types_by_name[field.name])
        if inner is not None and isinstance(filled[field.name], dict):
            filled[field.name] = _with_defaults(inner, filled[field.name])
    return filled


def _field_type(cls: type, key: str, path: str, name: str) -> Any:
    fields = [field.name for field in dataclasses.fields(cls)]
    if key not in fields:
        raise MossError(f"--set {name}: no field {path!r}, expected one of {', '.join(fields)}")
    return typing.get_type_hints(cls)[key]


def _alternatives(field_type: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    union = typing.get_origin(field_type) in (typing.Union, types.UnionType)
    return typing.get_args(field_type) if union else (field_type,)


def _dataclass_of(field_type: Any) -> type | None:
    for alternative in _alternatives(field_type):
        if isinstance(alternative, type) and dataclasses.is_dataclass(alternative):
            return alternative
    return None


def _parse(text: str, field_type: Any) -> Any:
    alternatives = _alternatives(field_type)
    if text.lower() == "none" and type(None) in alternatives:
        return None
    if str in alternatives:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # read_config reports the wrong type

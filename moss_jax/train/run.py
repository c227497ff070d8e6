"""A run: everything that decides what `moss-jax train` does, as one value.

A config is a Python file that sets `RUN = Run(...)`; `--set optimizer.learning_rate=1e-4` changes a field. A run is
kept as JSON in its folder: an export needs no config.
"""

import ast
import dataclasses
import json
import math
import runpy
import traceback
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jax.data import Mixture
from moss_jax.errors import MossError
from moss_jax.nn.config import read_config, read_json, write_config
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.stages import Stage
from moss_jax.transformer import TransformerConfig
from moss_jax.transformer.config import ATTENTION, DTYPES, REMAT

RUN_FILE = "run.json"
ACTIONS = ("skip", "stop")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise MossError(f"run: {problem}")


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of the mesh axes; one of them may be 0: whatever is left of the devices, so that a config fits them all."""

    data: int = 1
    fsdp: int = 0
    tensor: int = 1
    sequence: int = 1

    def for_devices(self, count: int) -> dict[str, int]:
        """The four sizes on `count` devices. Raises MossError when they do not fit."""
        sizes = dataclasses.asdict(self)
        given = math.prod(size for size in sizes.values() if size)
        told = " x ".join(f"{name} {size or 'the rest'}" for name, size in sizes.items())
        if list(sizes.values()).count(0) > 1:
            raise MossError(f"mesh {told}: only one axis may be 0")
        if count % given or (given != count and 0 not in sizes.values()):
            raise MossError(f"mesh {told} does not fit {count} devices; the sizes must multiply to {count}")
        return {name: size or count // given for name, size in sizes.items()}


@dataclass(frozen=True)
class Guard:
    """What happens when a loss is no number, or a gradient is far larger than those before it.

    Such an update is never made. "skip" goes on with the next batch and says so; "stop" ends the run there, as does
    the `most`-th skipped update in a row.
    """

    action: str = "skip"  # one of ACTIONS
    spike: float | None = 10.0  # a gradient norm so many times the median of the last `window` is one; None: none is
    window: int = 100  # steps; there is no limit before half as many have been made
    most: int = 10  # updates skipped in a row

    def __post_init__(self):
        _require(self.action in ACTIONS, f"guard.action is {self.action!r}, expected one of {', '.join(ACTIONS)}")
        _require(self.spike is None or self.spike > 1, f"guard.spike is {self.spike}, expected above 1 or None")
        _require(self.window >= 2 and self.most >= 1, "guard.window and guard.most: expected at least 2 and 1")


@dataclass(frozen=True)
class Run:
    """One run of training. Paths are relative to where the command runs."""

    name: str  # in tables, plots and on Weights & Biases
    folder: str  # gets checkpoints, metrics and exports
    init: str  # a Qwen3, released or system folder, an earlier run's folder (its last export), or "random"
    stage: Stage
    optimizer: OptimizerConfig
    data: Mixture
    context: int  # rows of a sequence
    batch_size: int  # sequences of a step, over all devices and accumulation
    steps: int  # updates of the whole run
    model: TransformerConfig | None = None  # None: the sizes of `init`
    split: int | None = None  # layers of each branch when `init` is a Qwen3; None: a ninth of its depth
    held_out: Mixture | None = None  # what the evaluation reads
    workers: int = 0  # processes that read and pack ahead; 0: threads
    accumulate: int = 1  # parts that a batch is computed in, one after the other
    mesh: MeshSizes = MeshSizes()
    seed: int = 0  # of new weights
    dtype: str = "bfloat16"  # of activations
    frozen_dtype: str | None = "bfloat16"  # of parameters that do not train; None: as `init` has them
    remat: str = "full"  # what the backward pass recomputes: "none", "dots" or "full"
    attention: str = "auto"  # how attention is computed; "auto": by backend
    guard: Guard = Guard()
    save_every: int = 500  # steps; the last one is saved as well
    keep: int = 3  # newest checkpoints that stay
    evaluate_every: int = 0  # steps; 0: only at the end
    evaluate_batches: int = 8
    export_every: int = 0  # steps; 0: only at the end
    export_dtype: str | None = None  # of trained parameters in an export; None: as the frozen ones, else as dtype
    system: str | None = None  # whose codec, text tokenizer and voices an export gets; None: those of `init`. Beside a
    # Qwen3 it also says how many speech codes there are
    log_every: int = 10  # steps between two progress lines; metrics.jsonl gets every step
    tensorboard: bool = False
    wandb: str | None = None  # project on Weights & Biases
    profile: tuple[int, int] | None = None  # the first and the last step of a profile
    peak_tflops: float | None = None  # of one device at `dtype`, for the MFU; None: known kinds of devices

    def __post_init__(self):
        for name in ("context", "batch_size", "steps", "accumulate", "save_every", "evaluate_batches", "log_every"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, f"{name} is {value!r}, expected a whole number above 0")
        for name in ("evaluate_every", "export_every", "seed", "workers"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 0, f"{name} is {value!r}, expected a whole number, 0 or above")
        _require(self.keep >= 2, f"keep is {self.keep}, expected at least 2: one checkpoint may turn out to be damaged")
        _require(
            self.batch_size % self.accumulate == 0,
            f"batch_size {self.batch_size} does not divide into {self.accumulate} parts (accumulate)",
        )
        for name, known in (("dtype", DTYPES), ("frozen_dtype", (*DTYPES, None)), ("export_dtype", (*DTYPES, None)),
                            ("remat", REMAT), ("attention", ATTENTION)):  # fmt: skip
            value = getattr(self, name)
            _require(value in known, f"{name} is {value!r}, expected one of {', '.join(map(str, known))}")
        if self.profile is not None:
            first, last = self.profile
            _require(1 <= first <= last, f"profile is {self.profile}, expected the first and the last step of it")
        for name in ("folder", "init"):
            _require(bool(getattr(self, name)), f"{name} is empty")


def load_run(config: str | Path, assignments: Sequence[str] = ()) -> Run:
    """The run of a config file, with `name=value` assignments applied. Raises MossError in one line."""
    path = Path(config)
    if not path.is_file():
        raise MossError(f"{path}: no such file, expected a config such as configs/stage1.py")
    try:
        run = runpy.run_path(str(path)).get("RUN")
    except MossError as error:
        raise MossError(f"{path}: {error}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else 1)
        raise MossError(f"{path} line {line}: {type(error).__name__}: {error}") from error
    if not isinstance(run, Run):
        found = "nothing" if run is None else type(run).__name__
        raise MossError(f"{path}: sets RUN to {found}, expected a moss_jax.train.run.Run")
    return override(run, assignments)


def override(run: Run, assignments: Sequence[str]) -> Run:
    """The run with fields changed: "steps=100", "optimizer.learning_rate=1e-4", "data.seed=1".

    Values are read as their field's type: numbers, true, false, none, plain strings; lists and dictionaries as Python
    writes them. Where the schedule ends with the run, changing `steps` moves both.

    Raises:
        MossError: no such field (those that there are follow), a value of the wrong type, or fields that contradict
            each other.
    """
    values = write_config(run)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise MossError(f"--set {assignment}: expected name=value")
        _assign(values, name.strip(), text.strip())
    names = {assignment.partition("=")[0].strip() for assignment in assignments}
    follows = run.steps == run.optimizer.total_steps and "optimizer.total_steps" not in names
    if "steps" in names and follows and isinstance(values["steps"], int):
        values["optimizer"]["total_steps"] = values["steps"]
    return read_config(Run, values, "--set") if assignments else run


def read_run(folder: str | Path) -> Run:
    """The run that was made in a folder."""
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise MossError(f"{folder}: no {RUN_FILE} in it, expected the folder of a run")
    return read_config(Run, read_json(path), str(path))


def run_text(run: Run) -> str:
    """The run as JSON."""
    return json.dumps(write_config(run), indent=2) + "\n"


def _assign(values: dict[str, Any], name: str, text: str) -> None:
    *parents, leaf = name.split(".")
    cls: Any = Run
    for i, parent in enumerate(parents):
        where = ".".join(parents[: i + 1])
        cls = _dataclass_of(_hint(cls, parent, where, name))
        if cls is None:
            raise MossError(f"--set {name}: {where} has no fields")
        values = values[parent]
        if values is None:
            raise MossError(f"--set {name}: {where} is none in this config; set it there, or as a whole")
    values[leaf] = _parse(text, _hint(cls, leaf, name, name))


def _hint(cls: type, key: str, where: str, name: str) -> Any:
    hints = typing.get_type_hints(cls)
    if key not in hints:
        raise MossError(f"--set {name}: no field {where!r}, expected one of {', '.join(hints)}")
    return hints[key]


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _dataclass_of(hint: Any) -> type | None:
    return next((option for option in _options(hint) if dataclasses.is_dataclass(option)), None)


def _parse(text: str, hint: Any) -> Any:
    options = _options(hint)
    if text.lower() == "none" and type(None) in options:
        return None
    if str in options:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # of the wrong type, as read_config will say

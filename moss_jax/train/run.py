"""A run: everything that decides what `moss-jax train` does, as one value.

A config is a Python file that sets `RUN = Run(...)`; `--set optimizer.learning_rate=1e-4` changes a field. A run is
kept as JSON in its folder: an export needs no config.
"""

import ast
import dataclasses
import importlib
import json
import math
import runpy
import traceback
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jax.sharding import Mesh

from moss_jax.checkpoint.config_io import read_config, write_config
from moss_jax.data import Mixture
from moss_jax.documents import read_json, shown
from moss_jax.errors import MossError
from moss_jax.files import is_file
from moss_jax.progress import Say
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.speech_lm.config import ATTENTION, DTYPES, REMAT
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.run_folder import RUN_FILE
from moss_jax.train.speech_lm.stages import Stage

if TYPE_CHECKING:
    from moss_jax.train.task import Task

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


@dataclass(frozen=True, kw_only=True)
class BaseRun:
    """What every run has, whatever it trains. Paths are relative to where the command runs."""

    kind: ClassVar[str]  # a key of KINDS; stands in run.json
    shown: ClassVar[tuple[str, ...]] = ()  # metrics that people read beside the loss; those in _loss are plotted
    unit: ClassVar[str] = "tokens"  # of the throughput

    name: str  # in tables, plots and on Weights & Biases
    folder: str  # gets checkpoints, metrics and exports
    optimizer: OptimizerConfig
    batch_size: int  # sequences of a step, over all devices and accumulation
    steps: int  # updates of the whole run
    workers: int = 0  # processes that read ahead; 0: threads
    mesh: MeshSizes = MeshSizes()
    seed: int = 0  # of new weights
    dtype: str = "bfloat16"  # of activations
    guard: Guard = Guard()
    save_every: int = 500  # steps; the last one is saved as well
    keep: int = 3  # newest checkpoints that stay
    evaluate_every: int = 0  # steps; 0: only at the end
    evaluate_batches: int = 8
    export_every: int = 0  # steps; 0: only at the end
    export_dtype: str | None = None  # of trained parameters in an export; None: see the run
    log_every: int = 10  # steps between two progress lines; metrics.jsonl gets every step
    tensorboard: bool = False
    wandb: str | None = None  # project on Weights & Biases
    profile: tuple[int, int] | None = None  # the first and the last step of a profile
    peak_tflops: float | None = None  # of one device at `dtype`, for the MFU; None: known kinds of devices

    def __post_init__(self):
        self._check_whole(1, "batch_size", "steps", "save_every", "evaluate_batches", "log_every")
        self._check_whole(0, "evaluate_every", "export_every", "seed", "workers")
        self._check_known(dtype=DTYPES, export_dtype=(*DTYPES, None))
        _require(self.keep >= 2, f"keep is {self.keep}, expected at least 2: one checkpoint may turn out to be damaged")
        if self.profile is not None:
            first, last = self.profile
            _require(1 <= first <= last, f"profile is {self.profile}, expected the first and the last step of it")
        _require(bool(self.folder), "folder is empty")

    def _check_whole(self, least: int, *names: str) -> None:
        expected = "a whole number above 0" if least else "a whole number, 0 or above"
        for name in names:
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= least, f"{name} is {value!r}, expected {expected}")

    def _check_known(self, **known: tuple[str | None, ...]) -> None:
        for name, values in known.items():
            value = getattr(self, name)
            _require(value in values, f"{name} is {value!r}, expected one of {', '.join(map(str, values))}")

    @property
    def loss_weights(self) -> dict[str, float]:
        """{metric: weight} of the losses that the loss is the weighted sum of; empty where it is another function."""
        return {}

    def task(self, mesh: Mesh, say: Say) -> "Task":
        """What the loop trains; see `moss_jax.train.task`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Run(BaseRun):
    """One run of a language model's training."""

    kind: ClassVar[str] = "language_model"
    shown: ClassVar[tuple[str, ...]] = ("text_loss", "audio_loss")

    init: str  # a Qwen3, released or system folder, an earlier run's folder (its last export), or "random"
    stage: Stage
    data: Mixture
    context: int  # rows of a sequence
    model: SpeechLMConfig | None = None  # None: the sizes of `init`
    split: int | None = None  # layers of each branch when `init` is a Qwen3; None: a ninth of its depth
    held_out: Mixture | None = None  # what the evaluation reads
    accumulate: int = 1  # parts that a batch is computed in, one after the other
    frozen_dtype: str | None = "bfloat16"  # of parameters that do not train; None: as `init` has them
    remat: str = "full"  # what the backward pass recomputes: "none", "dots" or "full"
    attention: str = "auto"  # how attention is computed; "auto": by backend
    export_dtype: str | None = None  # of trained parameters in an export; None: as the frozen ones, else as dtype
    system: str | None = None  # whose codec, text tokenizer and voices an export gets; None: those of `init`. Beside a
    # Qwen3 it also says how many speech codes there are

    def __post_init__(self):
        super().__post_init__()
        self._check_whole(1, "context", "accumulate")
        _require(
            self.batch_size % self.accumulate == 0,
            f"batch_size {self.batch_size} does not divide into {self.accumulate} parts (accumulate)",
        )
        self._check_known(frozen_dtype=(*DTYPES, None), remat=REMAT, attention=ATTENTION)
        _require(bool(self.init), "init is empty")

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"text_loss": self.stage.text_weight, "audio_loss": self.stage.audio_weight}

    def task(self, mesh: Mesh, say: Say) -> "Task":
        from moss_jax.train.speech_lm.task import LanguageModel

        return LanguageModel(self, mesh, say)


# kind -> where its run is; a run.json without a kind is a language model's
KINDS = {
    Run.kind: "moss_jax.train.run:Run",
    "speech_tokenizer": "moss_jax.train.speech_tokenizer.run:SpeechTokenizerRun",
    "flow": "moss_jax.train.speech_decoder.run:FlowRun",
    "vocoder": "moss_jax.train.speech_decoder.run:VocoderRun",
}


def run_class(kind: str) -> type[BaseRun]:
    """The run of a kind. Raises MossError when there is no such kind."""
    if kind not in KINDS:
        raise MossError(f"run: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def load_run(config: str | Path, assignments: Sequence[str] = ()) -> BaseRun:
    """The run of a config file, with `name=value` assignments applied. Raises MossError in one line."""
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
        raise MossError(f"{path}: sets RUN to {found}, expected a moss_jax.train.run.Run or another run")
    return override(run, assignments)


def override(run: BaseRun, assignments: Sequence[str]) -> BaseRun:
    """The run with fields changed: "steps=100", "optimizer.learning_rate=1e-4", "data.seed=1".

    Values are read as their field's type: numbers, true, false, none, plain strings; lists and dictionaries as Python
    writes them. In a dictionary that stands for a group of fields, those that are not named have their defaults.
    Where the schedule ends with the run, changing `steps` moves both.

    Raises:
        MossError: no such field (those that there are follow), a value of the wrong type, or fields that contradict
            each other.
    """
    values = write_config(run)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise MossError(f"--set {assignment}: expected name=value")
        _assign(type(run), values, name.strip(), text.strip())
    names = {assignment.partition("=")[0].strip() for assignment in assignments}
    follows = run.steps == run.optimizer.total_steps and "optimizer.total_steps" not in names
    if "steps" in names and follows and isinstance(values["steps"], int):
        values["optimizer"]["total_steps"] = values["steps"]
    return read_config(type(run), values, "--set") if assignments else run


def values_in(folder: str | Path) -> dict[str, Any]:
    """The JSON of the run that was made in a folder, its kind included."""
    path = Path(folder) / RUN_FILE
    if not is_file(path):
        raise MossError(f"{folder}: no {RUN_FILE} in it, expected the folder of a run")
    values = {"kind": Run.kind, **read_json(path)}
    if not isinstance(values["kind"], str):
        raise MossError(f"{path}: kind is {shown(values['kind'])}, expected one of {', '.join(KINDS)}")
    return values


def read_run(folder: str | Path) -> BaseRun:
    """The run that was made in a folder."""
    values = values_in(folder)
    return read_config(run_class(values.pop("kind")), values, str(Path(folder) / RUN_FILE))


def run_values(run: BaseRun) -> dict[str, Any]:
    """The run as a JSON object: its kind and its fields."""
    return {"kind": run.kind, **write_config(run)}


def run_text(run: BaseRun) -> str:
    """The run as JSON."""
    return json.dumps(run_values(run), indent=2) + "\n"


def _assign(cls: Any, values: dict[str, Any], name: str, text: str) -> None:
    *parents, leaf = name.split(".")
    for i, parent in enumerate(parents):
        where = ".".join(parents[: i + 1])
        cls = _dataclass_of(_hint(cls, parent, where, name))
        if cls is None:
            raise MossError(f"--set {name}: {where} has no fields")
        values = values[parent]
        if values is None:
            raise MossError(
                f"--set {name}: {where} is none in this config; set it as a whole before, such as --set {where}={{}} "
                "for its defaults"
            )
    hint = _hint(cls, leaf, name, name)
    value = _parse(text, hint)
    inner = _dataclass_of(hint)
    values[leaf] = _with_defaults(inner, value) if inner is not None and isinstance(value, dict) else value


def _with_defaults(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass as they are given, and those that are not given as their defaults."""
    hints = typing.get_type_hints(cls)
    filled = dict(values)
    for field in dataclasses.fields(cls):
        if field.name not in filled:
            if field.default is not dataclasses.MISSING:
                default = field.default
            elif field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            else:
                continue  # it is reported as missing
            filled[field.name] = write_config(default) if dataclasses.is_dataclass(default) else default
        inner = _dataclass_of(hints[field.name])
        if inner is not None and isinstance(filled[field.name], dict):
            filled[field.name] = _with_defaults(inner, filled[field.name])
    return filled


def _hint(cls: type, key: str, where: str, name: str) -> Any:
    fields = [field.name for field in dataclasses.fields(cls)]
    if key not in fields:
        raise MossError(f"--set {name}: no field {where!r}, expected one of {', '.join(fields)}")
    return typing.get_type_hints(cls)[key]


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

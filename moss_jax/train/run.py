"""A run as one value: everything that decides what `moss-jax train` does.

`BaseRun` holds what all runs have in common; each kind of model adds its own fields in `speech_lm/run.py`,
`speech_tokenizer/run.py` and `speech_decoder/run.py`. A config is a Python file that sets `RUN` to a run.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from moss_jax.errors import MossError
from moss_jax.speech_lm.config import DTYPES
from moss_jax.train.optimizer import OptimizerConfig

RANDOM = "random"  # the `init` of a run that starts from new weights
GUARD_ACTIONS = ("skip", "stop")


def require(condition: bool, problem: str) -> None:
    """Raises MossError with the problem unless the condition holds."""
    if not condition:
        raise MossError(f"run: {problem}")


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of the mesh axes. One may be 0: it takes the remaining devices, so that a config fits any number."""

    data: int = 1
    fsdp: int = 0
    tensor: int = 1
    sequence: int = 1

    def for_devices(self, count: int) -> dict[str, int]:
        """The four sizes on `count` devices. Raises MossError when they do not fit."""
        sizes = dataclasses.asdict(self)
        product = math.prod(size for size in sizes.values() if size)
        text = " x ".join(f"{name} {size or 'the rest'}" for name, size in sizes.items())
        if list(sizes.values()).count(0) > 1:
            raise MossError(f"mesh {text}: only one axis may be 0")
        if count % product or (product != count and 0 not in sizes.values()):
            raise MossError(f"mesh {text} does not fit {count} devices; the sizes must multiply to {count}")
        return {name: size or count // product for name, size in sizes.items()}


@dataclass(frozen=True)
class Guard:
    """What happens when a loss or gradient is not finite, or a gradient is far larger than those before it.

    Such an update is never applied. "skip" reports it and continues with the next batch; "stop" ends the run at once.
    A run also ends after `max_consecutive_skips` skipped updates in a row.
    """

    action: str = "skip"  # one of GUARD_ACTIONS
    spike: float | None = 10.0  # largest gradient norm, as a multiple of the median of the window; None: no limit
    window: int = 100  # steps of the median; there is no limit before half as many updates have been made
    max_consecutive_skips: int = 10

    def __post_init__(self) -> None:
        require(
            self.action in GUARD_ACTIONS,
            f"guard.action is {self.action!r}, expected one of {', '.join(GUARD_ACTIONS)}",
        )
        require(self.spike is None or self.spike > 1, f"guard.spike is {self.spike}, expected above 1 or None")
        require(self.window >= 2, f"guard.window is {self.window}, expected at least 2")
        require(
            self.max_consecutive_skips >= 1,
            f"guard.max_consecutive_skips is {self.max_consecutive_skips}, expected at least 1",
        )


@dataclass(frozen=True, kw_only=True)
class BaseRun:
    """The fields that every run has, whatever it trains. Paths are relative to the working directory."""

    kind: ClassVar[str]  # a key of moss_jax.train.tasks.KINDS, written into run.json
    reported_metrics: ClassVar[tuple[str, ...]] = ()  # shown next to the loss; those that end in _loss are plotted
    throughput_unit: ClassVar[str] = "tokens"

    name: str  # in tables, plots and on Weights & Biases
    folder: str  # receives checkpoints, metrics and exports
    optimizer: OptimizerConfig
    batch_size: int  # sequences per step, over all devices and accumulation
    steps: int  # updates of the whole run
    workers: int = 0  # processes that prefetch batches; 0: threads
    mesh: MeshSizes = MeshSizes()
    seed: int = 0  # of new weights
    dtype: str = "bfloat16"  # of activations
    guard: Guard = Guard()
    save_every: int = 500  # steps; the last step is always saved
    keep: int = 3  # how many of the newest checkpoints are kept
    evaluate_every: int = 0  # steps; 0: only at the end
    evaluate_batches: int = 8
    export_every: int = 0  # steps; 0: only at the end
    export_dtype: str | None = None  # of trained parameters in an export; None: see the kind of run
    log_every: int = 10  # steps between two progress lines; metrics.jsonl has every step
    tensorboard: bool = False
    wandb: str | None = None  # project on Weights & Biases
    profile: tuple[int, int] | None = None  # the first and the last step of a profile
    peak_tflops: float | None = None  # of one device at `dtype`, for the MFU; None: looked up for known devices

    def __post_init__(self) -> None:
        self._check_whole(1, "batch_size", "steps", "save_every", "evaluate_batches", "log_every")
        self._check_whole(0, "evaluate_every", "export_every", "seed", "workers")
        self._check_known(dtype=DTYPES, export_dtype=(*DTYPES, None))
        require(self.keep >= 2, f"keep is {self.keep}, expected at least 2: one checkpoint may turn out to be damaged")
        if self.profile is not None:
            first, last = self.profile
            require(1 <= first <= last, f"profile is {self.profile}, expected its first and last step")
        require(bool(self.folder), "folder is empty")

    def _check_whole(self, minimum: int, *names: str) -> None:
        expected = "a whole number above 0" if minimum else "a whole number, 0 or above"
        for name in names:
            value = getattr(self, name)
            require(isinstance(value, int) and value >= minimum, f"{name} is {value!r}, expected {expected}")

    def _check_known(self, **known: tuple[str | None, ...]) -> None:
        for name, values in known.items():
            value = getattr(self, name)
            require(value in values, f"{name} is {value!r}, expected one of {', '.join(map(str, values))}")

    @property
    def loss_weights(self) -> dict[str, float]:
        """{metric: weight} where the loss is a weighted sum of metrics; empty where it is another function of them."""
        return {}

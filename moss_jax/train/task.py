"""The interface between the loop and what it trains.

The loop handles steps, checkpoints, metrics and preemption; a task handles one kind of model.

To train another kind of model, write

- a run: a frozen dataclass that extends `moss_jax.train.run.BaseRun` with its own fields, `kind` and
  `reported_metrics`;
- a class with the members of `Task`, and a function (run, mesh, say) -> (task, initial parameters);
- one line in `moss_jax.train.tasks.KINDS`.

`moss-jax train`, `export` and `plot` then support it.

A run that is killed and resumed must give the same numbers as one that is not. Therefore

- the initial parameters are the same bits each time for the same run (new weights come from `run.seed`);
- everything that a step changes is in the state, nothing in the task; random numbers are derived from
  (seed, state.step), never from state of the host;
- batches are a function of (seed, step), and `get_state` of the feed after a step identifies the next batch;
- an evaluation reads the same batches each time and changes nothing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from moss_jax.errors import MossError
from moss_jax.train.feed import Feed
from moss_jax.train.preemption import Preemption
from moss_jax.train.state import TrainState

Flat = dict[str, jax.Array]  # parameters by path
Batch = dict[str, jax.Array]
Step = Callable[[TrainState, Flat, Batch, np.ndarray], tuple[TrainState, dict[str, jax.Array]]]
# Returns a dictionary with "loss" for JSON, or None when a preemption notice arrived meanwhile.
Evaluate = Callable[[TrainState, Preemption], dict[str, Any] | None]


class Task(Protocol):
    """One kind of training, as the loop sees it. Its methods may be called in any order.

    Attributes:
        frozen: flat parameters that no step changes; {} where there are none.
        description: what is trained, for a progress line: "stage stage1".
        batch_description: what a step reads, for the same line: "16 x 2048 rows".
    """

    frozen: Flat
    description: str
    batch_description: str

    def state_shardings(self) -> Any:
        """A TrainState with a sharding for each array; `moss_jax.train.state.shardings_of` makes one."""

    def feed(self) -> Feed:
        """Opens the training batches."""

    def new_state(self, parameters: Flat) -> TrainState:
        """The state before the first step.

        It is traced: compiled, or evaluated for its shapes only. What changes without a gradient goes into `extra`;
        several optimizers are a dictionary in `opt_state`. Checkpoints hold all of it.
        """

    def make_step(self) -> Step:
        """The compiled (state, frozen, batch, limit) -> (state, metrics); the state is donated.

        `limit` float32 [2]: the largest loss and the largest gradient norm of an update that is applied; see
        `moss_jax.train.state.apply_update`. Metrics are float32; `loss`, `grad_norm`, `learning_rate` and `skipped` are
        required, further scalars are logged as they are.
        """

    def evaluation(self) -> Evaluate | None:
        """What evaluates the model on held-out data; None where there is no such data."""

    def compatibility(self) -> dict[str, dict[str, Any]]:
        """{"architecture": {...}, ...}: JSON values that must be equal in a checkpoint and the run that resumes it.
        Names that end in "_weight" may differ."""

    def tokens(self, batch: Batch) -> int:
        """The size of a batch in `run.throughput_unit`."""

    def flops(self, batch: Batch) -> float:
        """FLOP of the step over this batch, by arithmetic."""

    def log_entry(self, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The entry of a step's metrics in metrics.jsonl; `scalars` is enough for most."""

    def export(self, state: TrainState, folder: Path, dtype: str | None = None) -> None:
        """Writes what the model is used from, completely or not at all (`moss_jax.files.replace_folder`).

        An existing folder is replaced. Every process calls it. Of the state only `params` and `extra` are present.

        Args:
            dtype: of the trained parameters; None: as the run says.
        """


def scalars(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The metrics that are a single number."""
    return {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}


def check_rows(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises MossError when a batch does not divide over the devices."""
    rows = batch_size // accumulate
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise MossError(
            f"batch_size {batch_size} in {accumulate} part(s) does not divide over the mesh's "
            f"data x fsdp of {parts}; choose a multiple of {parts * accumulate}"
        )

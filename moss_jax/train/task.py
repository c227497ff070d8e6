"""What the loop asks of the thing that is trained. The loop knows steps, checkpoints, metrics and notices; a task knows
one kind of model. `run.task(mesh, say)` makes it.

To train another model: a run, which is a frozen dataclass that extends `moss_jax.train.run.BaseRun` with the model's
own fields, its `kind` and what of its metrics people read (`shown`), with a line in `KINDS` there; and a class with
the members of `Task`. `moss-jax train`, `export` and `plot` then serve it.

What a task must keep to, so that a run that was killed and resumed gives every number of one that was not:

- `start` gives the same bits each time for the same run (new weights from `run.seed`);
- what a step changes is in the state, nothing in the task; random draws come from (seed, state.step), never from the
  host's state;
- the batches are a function of (seed, step); `get_state` after a step names the batch that comes next;
- an evaluation reads the same batches each time and changes nothing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from moss_jax.errors import MossError
from moss_jax.train.preemption import Preemption
from moss_jax.train.state import TrainState

Flat = dict[str, jax.Array]
Batch = dict[str, jax.Array]
Step = Callable[[TrainState, Flat, Batch, np.ndarray], tuple[TrainState, dict[str, jax.Array]]]


class Batches(Protocol):
    """An iterator without end over batches that lie on the mesh. `moss_jax.train.feed.Feed` is one."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any:
        """Where it stands, for JSON; the same in every process."""

    def set_state(self, state: Any) -> None:
        """Goes where `get_state` was called. Raises MossError when that was with other data."""

    def skip_to(self, step: int) -> None:
        """The batch of update `step` + 1 comes next."""

    def close(self) -> None: ...


class Task(Protocol):
    """One kind of training, as the loop sees it. Methods are called in the order in which they stand here.

    Attributes:
        frozen: flat parameters that no step changes; there after `start`. {} where there are none.
        what: who trains, for a line to people: "stage stage1".
        rows: what a step reads, for the same line: "16 x 2048 rows".
    """

    frozen: Flat
    what: str
    rows: str

    def start(self) -> Flat:
        """The flat {path: array} that `new_state` takes, on the mesh: all that is not frozen.

        Raises:
            MossError: what the run starts from is not there, damaged, or does not fit.
        """

    def state_shardings(self) -> TrainState:
        """A TrainState of shardings; `moss_jax.train.state.shardings_of` makes one."""

    def feed(self) -> Batches:
        """The batches that are trained on."""

    def new_state(self, parameters: Flat) -> TrainState:
        """The state before the first step. It is traced: compiled, or asked for its shapes alone. What is not changed
        by a gradient goes into `extra`; several optimizers are a dictionary in `opt_state`. Checkpoints hold it all."""

    def make_step(self) -> Step:
        """The compiled (state, frozen, batch, limit) -> (state, metrics); the state is donated.

        `limit` float32 [2]: the largest loss and the largest gradient norm of an update that is made; see
        `moss_jax.train.state.updated`. Metrics are float32; `loss`, `grad_norm`, `learning_rate` and `skipped` are
        needed, further scalars are written down as they are.
        """

    def evaluation(self) -> Callable[[TrainState, Preemption], dict[str, Any] | None] | None:
        """What measures the model on held-out data: a dictionary with "loss" for JSON, or None when a notice to end
        came meanwhile. None instead of a function: nothing is held out."""

    def described(self) -> dict[str, dict[str, Any]]:
        """{"architecture": {...}, ...}: what must be the same when a run goes on from a checkpoint, JSON. What ends in
        "_weight" may change."""

    def tokens(self, batch: Batch) -> int:
        """How much of `run.unit` a batch is, for the throughput."""

    def flops(self, batch: Batch) -> float:
        """FLOP of the step over this batch, by arithmetic."""

    def entry(self, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What goes into metrics.jsonl of a step's metrics; `scalars` is enough for most."""

    def export(self, state: TrainState, folder: Path, dtype: str | None = None) -> None:
        """Writes what the model is used by, whole or not at all, in place of one that is there
        (`moss_jax.files.replace_folder`). Every process calls it; of the state only `params` and `extra` are there.

        Args:
            dtype: of what trained; None: as the run says.
        """


def scalars(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The metrics that are one number."""
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

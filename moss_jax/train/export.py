"""Exports a checkpoint as what its model is used from."""

from pathlib import Path

import jax

from moss_jax.errors import MossError
from moss_jax.files import output_lock
from moss_jax.nn.fingerprint import fingerprint
from moss_jax.progress import Say
from moss_jax.sharding import make_mesh
from moss_jax.speech_lm.config import DTYPES
from moss_jax.train.checkpoints import CHECKPOINTS, Checkpoints, verify
from moss_jax.train.gather import with_sharding
from moss_jax.train.record import check_record
from moss_jax.train.run_file import read_run
from moss_jax.train.state import TrainState
from moss_jax.train.task import Task
from moss_jax.train.tasks import prepare


def export_checkpoint(
    folder: str | Path, output: str | Path, step: int | None = None, dtype: str | None = None, say: Say = print
) -> None:
    """Writes a checkpoint of a run as what its model is used from: a language model as a system.

    Args:
        folder: of the run.
        output: a folder that does not exist yet, or is empty.
        step: of the checkpoint; None: the newest complete one.
        dtype: of the trained parameters; None: as the run says.

    Raises:
        MossError: no such run, checkpoint or dtype, a damaged checkpoint, or `output` exists, is being written by
            another process, or cannot be written.
    """
    output = Path(output)
    read_run(folder)
    if dtype is not None and dtype not in DTYPES:
        raise MossError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    with output_lock(output):
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise MossError(f"{output}: already exists; remove it or choose another folder")
        task, state = load_checkpoint(folder, step, say)
        task.export(state, output, dtype)


def load_checkpoint(folder: str | Path, step: int | None = None, say: Say = print) -> tuple[Task, TrainState]:
    """The task of a run and its state at a checkpoint, without the optimizer's, on one device.

    Args:
        step: of the checkpoint; None: the newest complete one.

    Raises:
        MossError: no such run or checkpoint, a damaged one, or one that does not fit.
    """
    folder = Path(folder)
    run = read_run(folder)
    checkpoints = Checkpoints(folder / CHECKPOINTS, run.keep, say)
    try:
        if step is None and (step := checkpoints.newest_complete()) is None:
            raise MossError(f"{folder}: this run has no complete checkpoint yet")
        if step not in checkpoints.steps():
            steps = ", ".join(map(str, checkpoints.steps())) or "none"
            raise MossError(f"{folder}: no checkpoint of step {step}, existing ones: {steps}")
        path = checkpoints.folder / str(step)
        if problem := verify(path):
            raise MossError(f"{path}: damaged, {problem}")
        mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
        task, parameters = prepare(run, mesh, say)
        like = jax.tree.map(with_sharding, jax.eval_shape(task.new_state, parameters), task.state_shardings())
        del parameters
        expected = task.compatibility() | {"frozen": fingerprint(task.frozen)}
        check_record(checkpoints.record(step), expected, path, say)
        state = checkpoints.restore_state(step, like, optimizer=False)
    finally:
        checkpoints.close()
    return task, state

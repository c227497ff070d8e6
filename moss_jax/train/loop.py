"""The training loop: `train(run)` starts a run or resumes it from its newest complete checkpoint.

Exit codes:

    0 done   3 stopped by the guard   75 preempted: saved, rerun the same command to resume   (2 bad input: a MossError)

After update s follow, as far as they are due: its metrics, a checkpoint, an evaluation, an export. What is lost when a
process is killed is done again from the checkpoint before it, evaluations and exports included, and metrics.jsonl is
truncated to that checkpoint. On the same mesh every number is then the same as without the interruption.

    FOLDER/run.json, metrics.jsonl, evaluations.jsonl, checkpoints/STEP/, exports/STEP/, profile/, tensorboard/
"""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moss_jax.errors import MossError
from moss_jax.files import folder_lock, write_text
from moss_jax.nn.fingerprint import fingerprint
from moss_jax.progress import Say, duration, silent
from moss_jax.sharding import make_mesh
from moss_jax.train.checkpoints import CHECKPOINTS, Checkpoints
from moss_jax.train.gather import with_sharding
from moss_jax.train.guard import Watch
from moss_jax.train.metrics import Board, IntervalMetrics, RunLog, losses, measured, memory_gib
from moss_jax.train.preemption import Preemption
from moss_jax.train.record import check_record
from moss_jax.train.run import BaseRun
from moss_jax.train.run_file import read_run_values, run_text, run_values
from moss_jax.train.run_folder import EXPORTS, METRICS_FILE, RUN_FILE
from moss_jax.train.speech_lm.flops import peak_flops
from moss_jax.train.state import TrainState
from moss_jax.train.task import Batch
from moss_jax.train.tasks import prepare

# 75 is EX_TEMPFAIL of sysexits.h: try again later
DONE = 0
STOPPED = 3
PREEMPTED = 75
PROFILE = "profile"


def train(run: BaseRun, say: Say = print) -> int:
    """Trains from the beginning, or resumes from the newest complete checkpoint; returns DONE, STOPPED or PREEMPTED.

    In a run of several processes each of them calls this, after `jax.distributed` has been initialised.

    Args:
        say: receives progress lines, on the first process only.

    Raises:
        MossError: some input does not fit or cannot be read, or output cannot be written. What was saved is kept.
    """
    say = say if jax.process_index() == 0 else silent
    with _run_lock(Path(run.folder)), Preemption() as preemption:
        sizes = run.mesh.for_devices(jax.device_count())
        mesh = make_mesh(data=sizes["data"], fsdp=sizes["fsdp"], tensor=sizes["tensor"], sequence=sizes["sequence"])
        resources = contextlib.ExitStack()
        try:
            with jax.set_mesh(mesh):
                code = Loop(run, mesh, preemption, say, resources).run_to_the_end()
        except BaseException:
            # The first error is the one that is reported.
            with contextlib.suppress(MossError):
                resources.close()
            raise
        resources.close()
        return code


@contextlib.contextmanager
def _run_lock(folder: Path) -> Iterator[None]:
    """Keeps other runs out of the folder. The first process of a run takes the lock; all fail when it is taken."""
    with contextlib.ExitStack() as stack:
        problem = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(folder_lock(folder))
            except MossError as error:
                problem = error
        if jax.process_count() > 1:
            failed = multihost_utils.broadcast_one_to_all(np.asarray(problem is not None))
            if failed and problem is None:
                problem = MossError(f"{folder}: the first process of the run cannot write to this folder")
        if problem is not None:
            raise problem
        yield


@dataclass(frozen=True)
class _Pending:
    """An update whose metrics are still being computed on the device."""

    step: int
    metrics: dict[str, jax.Array]
    tokens: int
    flops: float


class Loop:
    """One process's part of a run. All its decisions follow from values that are the same in every process.

    Create and use it under `jax.set_mesh(mesh)`.

    Args:
        resources: receives what must be closed at the end, such as a save that is still being written.
    """

    def __init__(self, run: BaseRun, mesh: Mesh, preemption: Preemption, say: Say, resources: contextlib.ExitStack):
        self._run = run
        self._mesh = mesh
        self._preemption = preemption
        self._say = say
        self._folder = Path(run.folder)
        self._watch = Watch(run.guard)
        self._checkpoints = Checkpoints(self._folder / CHECKPOINTS, run.keep, say)
        resources.callback(self._checkpoints.close)

        self._task, parameters = prepare(run, mesh, say)
        self._frozen = self._task.frozen
        self._compatibility = self._task.compatibility() | {"frozen": fingerprint(self._frozen)}
        self._feed = self._task.feed()
        resources.callback(self._feed.close)

        resumed_step = self._checkpoints.newest_complete()
        self._report_changes()
        shardings = self._task.state_shardings()
        if resumed_step is None:
            self._step = 0
            self._tokens = 0
            new_state = jax.jit(self._task.new_state, out_shardings=shardings, donate_argnums=0)
            self._state = new_state(parameters)
        else:
            shapes = jax.eval_shape(self._task.new_state, parameters)
            jax.tree.map(lambda x: x.delete(), parameters)
            like = jax.tree.map(with_sharding, shapes, shardings)
            self._step = resumed_step
            self._tokens, self._state = self._restore(resumed_step, like)
        self._saved_step = self._step
        self._data_state = self._feed.get_state()  # identifies the batch after the current step

        self._compiled_step = self._task.make_step()
        self._evaluate = self._task.evaluation()
        peak = 1e12 * run.peak_tflops if run.peak_tflops else peak_flops(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()  # FLOP/s of all devices; None where it is not known
        self._interval = IntervalMetrics(run.reported_metrics, run.loss_weights, run.throughput_unit, self._peak)
        # The first process writes metrics and evaluations.
        self._log = self._open_log(resources) if jax.process_index() == 0 else None

        self._pending: _Pending | None = None
        self._stop_reason: str | None = None
        # When the metrics of the step before were complete; None before the first step. Seconds since then that were
        # spent on waiting for data and on saving.
        self._clock: float | None = None
        self._data_seconds = 0.0
        self._saving_seconds = 0.0
        self._profiling = False
        resources.callback(self._end_profile)
        self._report_beginning()

    def run_to_the_end(self) -> int:
        """Runs all remaining steps; returns the exit code."""
        code = self._catch_up()
        batch = self._next_batch() if code is None else None
        while code is None and batch is not None:
            self._profile()
            batch = self._update(batch)
            preempted = self._preemption.reached(self._step)
            code = self._stopped(self._stop_reason) if self._stop_reason else self._pause(preempted)
            self._checkpoints.check()
        self._profile()
        if code is not None:
            return code
        self._checkpoints.wait()
        self._say(f"{self._run.name}: done after {self._run.steps} steps, results in {self._folder}")
        return DONE

    # Start and resume

    def _open_log(self, resources: contextlib.ExitStack) -> RunLog:
        run = self._run
        board = Board(self._folder, run.tensorboard, run.wandb, run.name, run_values(run))
        resources.callback(board.close)
        log = RunLog(self._folder, self._step, board)
        resources.callback(log.close)
        write_text(self._folder / RUN_FILE, run_text(run))
        for part in (self._folder / EXPORTS).glob(".*"):  # of an export that was killed
            shutil.rmtree(part, ignore_errors=True)
        return log

    def _restore(self, step: int, like: TrainState) -> tuple[int, TrainState]:
        """Restores the guard and the feed as well; returns (tokens so far, state) of a checkpoint."""
        record = self._checkpoints.record(step)
        folder = self._checkpoints.folder / str(step)
        check_record(record, self._compatibility, folder, self._say)
        state = self._checkpoints.restore_state(step, like)
        self._watch.restore(record["guard"])
        try:
            self._feed.set_state(record["data"])
        except MossError as error:
            self._say(f"note: {error}; from step {step + 1} on the batches are those of the new data")
            self._feed.skip_to(step)
        self._say(f"resuming after step {step} of {self._run.steps} ({folder})")
        return record["tokens"], state

    def _report_changes(self) -> None:
        """Reports the fields of the run that differ from its last start."""
        if (self._folder / RUN_FILE).is_file():
            before = _flat_fields(read_run_values(self._folder))
            now = _flat_fields(run_values(self._run))
            changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if changed:
                changes = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in changed)
                self._say(f"note: changed since this run was last started: {changes}")

    def _report_beginning(self) -> None:
        def count(flat: Mapping[str, Any]) -> int:
            return sum(leaf.size for leaf in flat.values())

        axes = " x ".join(f"{name} {size}" for name, size in self._mesh.shape.items() if size > 1) or "one device"
        self._say(
            f"{self._run.name}: {self._task.description} trains {count(self._state.params):,} parameters, "
            f"{count(self._frozen):,} are frozen; {self._task.batch_description} per step; mesh: {axes}"
        )

    # One update

    def _next_batch(self) -> Batch | None:
        """The next batch; None after the last step, so that no batch is fetched in vain."""
        if self._step >= self._run.steps:
            return None
        start = time.perf_counter()
        batch = next(self._feed)
        self._data_seconds += time.perf_counter() - start
        return batch

    def _update(self, batch: Batch) -> Batch | None:
        """Starts one update, fetches the next batch while it runs, and reports the metrics of the update before it."""
        limit = np.asarray([np.inf, self._watch.limit(self._step + 1)], np.float32)
        start = time.perf_counter()
        self._state, metrics = self._compiled_step(self._state, self._frozen, batch, limit)
        self._step += 1
        if self._clock is None:
            # The first call has compiled the step; it counts neither as computation nor as waiting for data.
            self._clock = time.perf_counter()
            self._data_seconds = 0.0
            self._say(f"the step is compiled, {duration(self._clock - start)}")
        previous = self._pending
        self._pending = _Pending(self._step, metrics, self._task.tokens(batch), self._task.flops(batch))
        self._data_state = self._feed.get_state()
        next_batch = self._next_batch()
        self._report(previous)
        return next_batch

    def _report_pending(self) -> None:
        """Waits for the last update and reports its metrics."""
        pending = self._pending
        self._pending = None
        self._report(pending)

    def _report(self, update: _Pending | None) -> None:
        if update is None:
            return
        metrics = jax.device_get(update.metrics)  # waits until the update is done
        now = time.perf_counter()
        assert self._clock is not None  # set when the update was started
        seconds = now - self._clock
        data_seconds = self._data_seconds
        saving_seconds = self._saving_seconds
        self._clock = now
        self._data_seconds = 0.0
        self._saving_seconds = 0.0
        run = self._run
        step = update.step
        self._tokens += update.tokens
        entry = {
            "step": step,
            **measured(self._task.log_entry(metrics)),
            "tokens": self._tokens,
            "tokens_per_second": update.tokens / seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "data_share": data_seconds / seconds,
            "checkpoint_seconds": saving_seconds,
            "mfu": self._peak and update.flops / seconds / self._peak,
            "memory_gib": memory_gib(),
        }
        stop_reason = self._watch.add(step, entry["grad_norm"], entry["skipped"] > 0)
        self._stop_reason = self._stop_reason or stop_reason
        if self._log is not None:
            self._log.write_step(entry)
        if entry["skipped"]:
            self._say(
                f"step {step}: skipped, its loss is {entry['loss']:.4g} and its gradient norm {entry['grad_norm']:.4g}"
            )
        self._interval.add(entry, update.flops)
        if step % run.log_every == 0 or step in (1, run.steps):
            self._say(self._interval.line(entry, run.steps))

    # Between updates

    def _due(self, every: int) -> bool:
        return self._step == self._run.steps or bool(every and self._step % every == 0)

    def _pause(self, preempted: bool) -> int | None:
        """Does what is due after this update; returns the exit code of a run that ends here."""
        run = self._run
        if not preempted and not any(map(self._due, (run.save_every, run.evaluate_every, run.export_every))):
            return None
        self._report_pending()
        if self._stop_reason:
            return self._stopped(self._stop_reason)
        if preempted or self._due(run.save_every):
            self._save()
        if preempted or not self._evaluate_and_export(self._due(run.evaluate_every), self._due(run.export_every)):
            return self._preempted()
        self._clock = time.perf_counter()
        self._data_seconds = 0.0
        return None

    def _catch_up(self) -> int | None:
        """After a restore: does the evaluation and export that were due at that step and are missing."""
        run = self._run
        if self._step == 0:
            return None
        missing = np.asarray(
            [
                self._log is not None and not self._log.has_evaluation(self._step),
                self._log is not None and not self._export_folder().is_dir(),
            ]
        )
        if jax.process_count() > 1:
            missing = multihost_utils.broadcast_one_to_all(missing)
        evaluation, export = map(bool, missing)
        done = self._evaluate_and_export(
            evaluation and self._due(run.evaluate_every), export and self._due(run.export_every)
        )
        return None if done else self._preempted()

    def _evaluate_and_export(self, evaluation: bool, export: bool) -> bool:
        """Returns False when a preemption notice arrived; the run is then saved without them."""
        if evaluation and self._evaluate is not None:
            start = time.perf_counter()
            entry = self._evaluate(self._state, self._preemption)
            if entry is None:
                self._save()
                return False
            seconds = time.perf_counter() - start
            if self._log is not None:
                self._log.write_evaluation({"step": self._step, **entry}, seconds)
            reported = losses(entry, self._run.reported_metrics)
            self._say(f"step {self._step}: held-out {reported}, {duration(seconds)}")
        if export:
            if self._preemption.asked:  # a large export takes longer than the time after a notice
                self._save()
                return False
            self._task.export(self._state, self._export_folder())
        return True

    def _export_folder(self) -> Path:
        return self._folder / EXPORTS / str(self._step)

    def _save(self) -> None:
        if self._saved_step == self._step:
            return
        start = time.perf_counter()
        if self._log is not None:
            self._log.sync()
        record = self._compatibility | {
            "step": self._step,
            "tokens": self._tokens,
            "data": self._data_state,
            "guard": self._watch.state(),
        }
        self._checkpoints.save_state(self._step, record, self._state)
        self._saved_step = self._step
        self._saving_seconds += time.perf_counter() - start

    def _preempted(self) -> int:
        self._checkpoints.wait()
        self._say(f"preempted: saved after step {self._step}; rerun the same command to resume")
        return PREEMPTED

    def _stopped(self, reason: str) -> int:
        self._checkpoints.wait()
        steps = self._checkpoints.steps()
        newest = f"the last checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
        self._say(
            f"stopped at step {self._step}: {reason}; {newest}. Look at {self._folder / METRICS_FILE}, then resume "
            "with another learning rate or --set guard.action=skip"
        )
        return STOPPED

    def _profile(self) -> None:
        """Starts or ends the profile, before an update."""
        if self._run.profile is None:
            return
        first, last = self._run.profile
        if self._profiling and self._step >= last:
            self._report_pending()
            self._end_profile()
            self._say(f"profile of steps {first} to {last}: {self._folder / PROFILE}")
        elif not self._profiling and first - 1 <= self._step < last:
            self._report_pending()
            jax.profiler.start_trace(str(self._folder / PROFILE))
            self._profiling = True

    def _end_profile(self) -> None:
        if self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False


def _flat_fields(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer.learning_rate": 1e-4, ...} of a run's JSON."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields |= _flat_fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields

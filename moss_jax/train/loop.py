"""The loop: `train(run)` begins, or goes on where the last checkpoint is, and ends with a code that says why.

    0 done   3 stopped by the guard   75 preempted: saved, the same command goes on   (2 bad input: a MossError)

After update s there come, in this order and as far as they are due: its metrics, a checkpoint, an evaluation, an
export. What is lost with a process is done again from the checkpoint before, evaluations and exports included, and
metrics.jsonl is cut back to it. On the same mesh every number is then the same as if nothing had happened.

    FOLDER/run.json, metrics.jsonl, evaluations.jsonl, checkpoints/STEP/, exports/STEP/, profile/, tensorboard/
"""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moss_jax.checkpoint import write_text
from moss_jax.errors import MossError
from moss_jax.files import folder_lock
from moss_jax.nn.fingerprint import fingerprint
from moss_jax.progress import Say, duration, silent
from moss_jax.sharding import make_mesh
from moss_jax.train.checkpoints import CHECKPOINTS, Checkpoints
from moss_jax.train.gather import with_sharding
from moss_jax.train.guard import Watch
from moss_jax.train.metrics import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    Board,
    IntervalMetrics,
    MetricsFile,
    losses,
    measured,
    memory_gib,
)
from moss_jax.train.preemption import Preemption
from moss_jax.train.record import check_record
from moss_jax.train.run import BaseRun, run_text, run_values, values_in
from moss_jax.train.run_folder import EXPORTS, RUN_FILE
from moss_jax.train.speech_lm.flops import peak_flops
from moss_jax.train.state import TrainState

# 75 is EX_TEMPFAIL: try again later
DONE = 0
STOPPED = 3
PREEMPTED = 75
PROFILE = "profile"


def train(run: BaseRun, say: Say = print) -> int:
    """Runs the run, from the beginning or from its newest whole checkpoint; returns DONE, STOPPED or PREEMPTED.

    In a run of several processes each calls this; `jax.distributed` has been initialised before.

    Args:
        say: gets lines for people, on the first process only.

    Raises:
        MossError: something that was given does not fit or cannot be read or written. What was saved stays.
    """
    with _run_lock(Path(run.folder)), Preemption() as preemption:
        loop = Loop(run, preemption, say if jax.process_index() == 0 else silent)
        try:
            with jax.set_mesh(loop.mesh):
                code = loop.run_to_the_end()
        except BaseException:
            with contextlib.suppress(MossError):  # what went wrong first is what is told
                loop.close()
            raise
        loop.close()
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


class Loop:
    """One process's part of a run. Everything it decides follows from values that are the same in all of them."""

    def __init__(self, run: BaseRun, preemption: Preemption, say: Say):
        self._run = run
        self._preemption = preemption
        self._say = say
        self._folder = Path(run.folder)
        self._first = jax.process_index() == 0
        self.mesh = make_mesh(**run.mesh.for_devices(jax.device_count()))
        self._task = run.task(self.mesh, say)
        self._checkpoints = Checkpoints(self._folder / CHECKPOINTS, run.keep, say)
        self._metrics = self._evaluations = self._board = self._feed = None
        self._watch = Watch(run.guard)
        self._pending = None
        self._stop = None
        # of the metrics before; seconds since then
        self._clock = None
        self._waited = 0.0
        self._saving = 0.0
        self._profiling = False

    def run_to_the_end(self) -> int:
        """Everything. Call it under `jax.set_mesh(loop.mesh)`."""
        self._begin()
        code = self._catch_up()
        batch = self._next_batch() if code is None and self._step < self._run.steps else None
        while code is None and self._step < self._run.steps:
            self._profile()
            batch = self._update(batch)
            preempted = self._preemption.reached(self._step)
            code = self._stopped() if self._stop else self._pause(preempted)
            self._checkpoints.check()
        self._profile()
        if code is not None:
            return code
        self._checkpoints.wait()
        self._say(f"{self._run.name}: done after {self._run.steps} steps, all of it in {self._folder}")
        return DONE

    def close(self) -> None:
        """Ends what runs in the background; a save that has begun is finished."""
        if self._profiling:
            jax.profiler.stop_trace()
        for part in (self._metrics, self._evaluations, self._board, self._feed):
            if part is not None:
                part.close()
        self._checkpoints.close()

    # beginning

    def _begin(self) -> None:
        run = self._run
        parameters = self._task.start()
        task = self._task
        states = task.state_shardings()
        self._frozen = task.frozen
        self._frozen_sum = fingerprint(self._frozen)
        self._feed = task.feed()
        self._data_state = self._feed.get_state()
        at = self._checkpoints.newest_whole()
        self._tell_changes()
        if at is None:
            self._step = 0
            self._tokens = 0
            self._state = jax.jit(task.new_state, out_shardings=states, donate_argnums=0)(parameters)
        else:
            like = jax.eval_shape(task.new_state, parameters)
            jax.tree.map(lambda x: x.delete(), parameters)
            self._restore(at, jax.tree.map(with_sharding, like, states))
        self._saved = self._step
        self._compiled_step = task.make_step()
        peak = 1e12 * run.peak_tflops if run.peak_tflops else peak_flops(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()  # FLOP/s; None where it is not known
        self._progress = IntervalMetrics(run.shown, run.loss_weights, run.unit, self._peak)
        self._evaluation = task.evaluation()
        if self._first:
            self._metrics = MetricsFile(self._folder / METRICS_FILE, self._step)
            self._evaluations = MetricsFile(self._folder / EVALUATIONS_FILE, self._step)
            write_text(self._folder / RUN_FILE, run_text(run))
            for part in (self._folder / EXPORTS).glob(".*"):  # of an export that was killed
                shutil.rmtree(part, ignore_errors=True)
            self._board = Board(self._folder, run.tensorboard, run.wandb, run.name, run_values(run))
        self._tell_beginning()

    def _restore(self, at: int, like: TrainState) -> None:
        record = self._checkpoints.record(at)
        where = self._checkpoints.folder / str(at)
        check_record(record, self._described(), where, self._say)
        self._state = self._checkpoints.restore_state(at, like)
        self._step = at
        self._tokens = record["tokens"]
        self._watch.restore(record["guard"])
        try:
            self._feed.set_state(record["data"])
        except MossError as error:
            self._say(f"note: {error}; the batches from step {at + 1} on are those of the new data")
            self._feed.skip_to(at)
        self._data_state = self._feed.get_state()
        self._say(f"going on after step {at} of {self._run.steps} ({where})")

    def _described(self) -> dict[str, Any]:
        return self._task.described() | {"frozen": self._frozen_sum}

    def _tell_changes(self) -> None:
        """Says what is not as it was when this run ran last."""
        if (self._folder / RUN_FILE).is_file():
            before = _fields(values_in(self._folder))
            now = _fields(run_values(self._run))
            changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if changed:
                told = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in changed)
                self._say(f"note: not as when this run ran last: {told}")

    def _tell_beginning(self) -> None:
        run = self._run

        def count(flat: Mapping[str, Any]) -> int:
            return sum(leaf.size for leaf in flat.values())

        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1) or "one device"
        self._say(
            f"{run.name}: {self._task.what} trains {count(self._state.params):,} parameters, "
            f"{count(self._frozen):,} are frozen; {self._task.rows} a step; mesh: {mesh}"
        )

    # one update

    def _next_batch(self) -> dict[str, jax.Array]:
        begun = time.perf_counter()
        batch = next(self._feed)
        self._waited += time.perf_counter() - begun
        return batch

    def _update(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array] | None:
        """Begins one update, fetches the next batch while it runs, and tells the metrics of the update before."""
        limit = np.asarray([np.inf, self._watch.limit(self._step + 1)], np.float32)
        first = self._clock is None
        begun = time.perf_counter()
        self._state, metrics = self._compiled_step(self._state, self._frozen, batch, limit)
        self._step += 1
        if first:
            self._clock = time.perf_counter()
            self._waited = 0.0
            self._say(f"the step is compiled, {duration(self._clock - begun)}")
        late = self._pending
        self._pending = (self._step, metrics, self._task.tokens(batch), self._task.flops(batch))
        self._data_state = self._feed.get_state()
        batch = self._next_batch() if self._step < self._run.steps else None
        self._tell(late)
        return batch

    def _tell_pending(self) -> None:
        """Waits for the last update and tells its metrics."""
        late = self._pending
        self._pending = None
        self._tell(late)

    def _tell(self, late: tuple[int, dict[str, jax.Array], int, float] | None) -> None:
        if late is None:
            return
        step, metrics, tokens, flops = late
        metrics = jax.device_get(metrics)  # waits until the update is done
        now = time.perf_counter()
        seconds = now - self._clock
        self._clock = now
        waited = self._waited
        self._waited = 0.0
        saving = self._saving
        self._saving = 0.0
        run = self._run
        self._tokens += tokens
        entry = {
            "step": step,
            **measured(self._task.entry(metrics)),
            "tokens": self._tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "data_seconds": waited,
            "data_share": waited / seconds,
            "checkpoint_seconds": saving,
            "mfu": self._peak and flops / seconds / self._peak,
            "memory_gib": memory_gib(),
        }
        self._stop = self._stop or self._watch.add(step, entry["grad_norm"], entry["skipped"] > 0)
        if self._first:
            self._metrics.write(entry)
            self._board.write("train", entry)
        if entry["skipped"]:
            self._say(
                f"step {step}: skipped, its loss is {entry['loss']:.4g} and its gradient norm {entry['grad_norm']:.4g}"
            )
        self._progress.add(entry, flops)
        if step % run.log_every == 0 or step in (1, run.steps):
            self._say(self._progress.line(entry, run.steps))

    # between updates

    def _due(self, every: int) -> bool:
        return self._step == self._run.steps or bool(every and self._step % every == 0)

    def _pause(self, preempted: bool) -> int | None:
        """What is due after this update; the code of a run that ends here."""
        run = self._run
        if not preempted and not any(map(self._due, (run.save_every, run.evaluate_every, run.export_every))):
            return None
        self._tell_pending()
        if self._stop:
            return self._stopped()
        if preempted or self._due(run.save_every):
            self._save()
        if preempted or not self._measure(self._due(run.evaluate_every), self._due(run.export_every)):
            return self._preempted()
        self._clock = time.perf_counter()
        self._waited = 0.0
        return None

    def _catch_up(self) -> int | None:
        """What was due after the step that was restored and did not come to be."""
        run = self._run
        if self._step == 0:
            return None
        missing = np.asarray(
            [
                self._first and not self._evaluations.has(self._step),
                self._first and not self._export_folder().is_dir(),
            ]
        )
        if jax.process_count() > 1:
            missing = multihost_utils.broadcast_one_to_all(missing)
        evaluation, export = map(bool, missing)
        done = self._measure(evaluation and self._due(run.evaluate_every), export and self._due(run.export_every))
        return None if done else self._preempted()

    def _measure(self, evaluation: bool, export: bool) -> bool:
        """Evaluates and exports; False when a notice came and the run is saved without them."""
        run = self._run
        if evaluation and self._evaluation is not None:
            begun = time.perf_counter()
            entry = self._evaluation(self._state, self._preemption)
            if entry is None:
                self._save()
                return False
            seconds = time.perf_counter() - begun
            if self._first:
                self._evaluations.write({"step": self._step, **entry, "seconds": seconds})
                self._board.write("held_out", {"step": self._step, **entry})
            self._say(f"step {self._step}: held-out {losses(entry, run.shown)}, {duration(seconds)}")
        if export:
            if self._preemption.asked:  # a large export takes longer than a notice leaves
                self._save()
                return False
            self._task.export(self._state, self._export_folder())
        return True

    def _export_folder(self) -> Path:
        return self._folder / EXPORTS / str(self._step)

    def _save(self) -> None:
        if self._saved == self._step:
            return
        begun = time.perf_counter()
        if self._first:
            self._metrics.sync()
        record = self._described() | {
            "step": self._step,
            "tokens": self._tokens,
            "data": self._data_state,
            "guard": self._watch.state(),
        }
        self._checkpoints.save_state(self._step, record, self._state)
        self._saved = self._step
        self._saving += time.perf_counter() - begun

    def _preempted(self) -> int:
        self._checkpoints.wait()
        self._say(f"asked to end: saved after step {self._step}; the same command goes on from there")
        return PREEMPTED

    def _stopped(self) -> int:
        self._checkpoints.wait()
        whole = self._checkpoints.steps()
        left = f"the last checkpoint is that of step {whole[-1]}" if whole else "there is no checkpoint yet"
        self._say(
            f"stopped at step {self._step}: {self._stop}; {left}. Look at {self._folder / METRICS_FILE}, then go on "
            "with another learning rate or --set guard.action=skip"
        )
        return STOPPED

    def _profile(self) -> None:
        """Begins or ends the profile, before an update."""
        if self._run.profile is None:
            return
        first, last = self._run.profile
        if self._profiling and self._step >= last:
            self._tell_pending()
            jax.profiler.stop_trace()
            self._profiling = False
            self._say(f"profile of steps {first} to {last}: {self._folder / PROFILE}")
        elif not self._profiling and first - 1 <= self._step < last:
            self._tell_pending()
            jax.profiler.start_trace(str(self._folder / PROFILE))
            self._profiling = True


def _fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer.learning_rate": 1e-4, ...} of a run's JSON."""
    fields = {}
    for name, value in values.items():
        fields |= _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields

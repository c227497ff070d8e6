"""Recipe steps that run in the background: one after another, each in a process of its own, beside the other steps.

On a CPU two training processes at a time make more progress than one after the other, because a small model's training
step does not use all cores all the time. While both run, each is bound to half of the cores.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import jax

from moss_jax.compile_cache import compiled_folder
from moss_jax.errors import MossError
from moss_jax.progress import Say
from moss_jax.train.host_memory import keep_freed_memory
from moss_jax.train.preemption import Preemption

# Exit codes of a step that did not fail: done, stopped by the guard of training, preempted after saving.
STOPPED = 3
PREEMPTED = 75

StepFunction = Callable[[Say], int]  # returns an exit code
StartProcess = Callable[[], BaseProcess]


class BackgroundStep(Protocol):
    """A step that is run by starting a process."""

    @property
    def name(self) -> str: ...

    @property
    def start(self) -> StartProcess | None: ...


class BackgroundRunner:
    """Runs background steps in the order in which they were added.

    Args:
        on_end: called with each step that has ended, its seconds and its exit code.

    Attributes:
        exit_code: 0, or the exit code of the step that did not succeed; no step is started after it.
    """

    def __init__(self, on_end: Callable[[BackgroundStep, float, int], None]):
        self.exit_code = 0
        self._on_end = on_end
        self._steps: list[BackgroundStep] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._failed_step = ""
        self._thread: threading.Thread | None = None
        self._process: BaseProcess | None = None

    def add(self, step: BackgroundStep) -> None:
        """Appends a step. Must not be called after `start`."""
        assert self._thread is None, "the background steps have been started"
        self._steps.append(step)

    def start(self) -> None:
        """Starts the first step, if there is one and it was not started before."""
        if self._steps and self._thread is None:
            self._thread = threading.Thread(target=self._run_on_half_of_the_cores, daemon=True)
            self._thread.start()

    def _run_on_half_of_the_cores(self) -> None:
        cores = _available_cores()
        _bind_to_cores(_halves(cores)[0])
        try:
            self._run()
        finally:
            _bind_to_cores(cores)

    def _run(self) -> None:
        for step in self._steps:
            with self._lock:
                if self._stopping:
                    return
                assert step.start is not None
                self._process = step.start()
            start = time.monotonic()
            self._process.join()
            self.exit_code = self._process.exitcode or 0
            self._on_end(step, time.monotonic() - start, self.exit_code)
            if self.exit_code:
                self._failed_step = step.name
                return

    def wait(self) -> int:
        """Waits for all steps; returns 0, 3 (stopped by the guard) or 75 (preempted, saved).

        Raises:
            MossError: a step failed; its process has reported why.
        """
        with Preemption() as preemption:
            while self._thread is not None and self._thread.is_alive():
                self._thread.join(0.2)
                if preemption.asked:
                    self.stop()
                    return PREEMPTED
        if self.exit_code not in (0, STOPPED, PREEMPTED):
            raise MossError(f"step {self._failed_step}: failed (exit code {self.exit_code})")
        return self.exit_code

    def stop(self) -> None:
        """Tells the running step to save and end, waits for it, and starts no other."""
        with self._lock:
            self._stopping = True
            if self._process is not None:
                self._process.terminate()
        if self._thread is not None:
            self._thread.join()


def background_process(function: StepFunction, name: str) -> StartProcess | None:
    """A function that starts `function` (which must be picklable) in a process bound to the second half of the cores.

    None where that would not help: with one core, or with a GPU or TPU, all of whose memory belongs to one process.

    The lines of the process begin with `name`. It saves and ends when its parent process is gone.
    """
    _, cores = _halves(_available_cores())
    if jax.default_backend() != "cpu" or not cores:
        return None

    def start() -> BaseProcess:
        arguments = (function, name, cores, compiled_folder())
        process = multiprocessing.get_context("spawn").Process(target=_process_main, args=arguments, daemon=True)
        process.start()
        return process

    return start


def _process_main(function: StepFunction, name: str, cores: Sequence[int], compile_cache: str | None) -> None:
    _bind_to_cores(cores)  # before XLA counts them
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", compile_cache)
    try:
        sys.exit(function(lambda line: print(f"{name} | {line}", file=sys.stderr, flush=True)))
    except MossError as error:
        sys.exit(f"{name} | {error}")


def _available_cores() -> list[int]:
    """The cores that this thread may use; empty if the operating system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _halves(cores: list[int]) -> tuple[list[int], list[int]]:
    """Both halves; of an odd number the first has one more."""
    middle = (len(cores) + 1) // 2
    return cores[:middle], cores[middle:]


def _bind_to_cores(cores: Sequence[int]) -> None:
    """Binds every thread of this process to these cores; does nothing if there are none."""
    if not cores:
        return
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(ProcessLookupError):  # the thread has just ended
            os.sched_setaffinity(int(thread.name), cores)

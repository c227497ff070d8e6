"""Steps of a recipe that are made beside the others, one after the other, each in a process of its own.

On a CPU two trainings, each in its own process, get through more than one after the other: what a small model's step
does not share among the cores, the other one uses. While there are two, each keeps to half of the cores.
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

from moss_jax.errors import MossError
from moss_jax.train.host_memory import keep_freed_memory
from moss_jax.train.preemption import Preemption

Work = Callable[[Callable[[str], None]], int]  # gets `say`, returns an exit code


class BackgroundStep(Protocol):
    name: str
    start: Callable[[], BaseProcess]


class BackgroundRunner:
    """Begins when it is asked to; `done` is called with each step when it ended, its seconds and its exit code.

    Attributes:
        code: 0, or that of the step that stopped; the steps after it are not begun.
    """

    def __init__(self, done: Callable[[BackgroundStep, float, int], None]):
        self._done = done
        self._left = []
        self.code = 0
        self._lock = threading.Lock()
        self._ended = False
        self._thread: threading.Thread | None = None
        self._process: BaseProcess | None = None

    def add(self, step: BackgroundStep) -> None:
        """Puts a step at the end; before `begin`."""
        self._left.append(step)

    def begin(self) -> None:
        """Starts the first step, unless that was done or there is none."""
        if self._left and self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def _work(self) -> None:
        cores = _cores()
        _keep_to(_halves(cores)[0])
        try:
            self._make()
        finally:
            _keep_to(cores)

    def _make(self) -> None:
        for step in self._left:
            with self._lock:
                if self._ended:
                    return
                self._process = step.start()
            begin = time.monotonic()
            self._process.join()
            self.code = self._process.exitcode
            self._done(step, time.monotonic() - begin, self.code)
            if self.code:
                self._stopped = step.name
                return

    def wait(self) -> int:
        """Waits for all steps; returns 0, 3 (stopped by the guard) or 75 (called to stop, saved).

        Raises:
            MossError: a step failed; it has said why.
        """
        with Preemption() as preemption:
            while self._thread is not None and self._thread.is_alive():
                self._thread.join(0.2)
                if preemption.asked:
                    self.stop()
                    return 75
        if self.code not in (0, 3, 75):
            raise MossError(f"step {self._stopped}: failed (exit code {self.code})")
        return self.code

    def stop(self) -> None:
        """Asks the step that is being made to save and end, waits for it, and begins none any more."""
        with self._lock:
            self._ended = True
            if self._process is not None:
                self._process.terminate()
        if self._thread is not None:
            self._thread.join()


def background_process(work: Work, name: str) -> Callable[[], BaseProcess] | None:
    """What starts `work` (which can be pickled) as the whole of a process, on the second half of the cores; None where
    that gains nothing: one core, or a GPU or TPU, of which one process has all.

    Its lines begin with `name`. The process saves and ends when the one that began it is gone.
    """
    _, own = _halves(_cores())
    if jax.default_backend() != "cpu" or not own:
        return None

    def start() -> BaseProcess:
        args = work, name, own, jax.config.jax_compilation_cache_dir
        process = multiprocessing.get_context("spawn").Process(target=_process, args=args, daemon=True)
        process.start()
        return process

    return start


def _process(work: Work, name: str, cores: Sequence[int], cache: str | None) -> None:
    _keep_to(cores)  # before XLA counts them
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", cache)
    try:
        sys.exit(work(lambda line: print(f"{name} | {line}", file=sys.stderr, flush=True)))
    except MossError as error:
        sys.exit(f"{name} | {error}")


def _cores() -> list[int]:
    """The processors that this thread may use; none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _halves(cores: list[int]) -> tuple[list[int], list[int]]:
    """The first may have one more."""
    middle = (len(cores) + 1) // 2
    return cores[:middle], cores[middle:]


def _keep_to(cores: Sequence[int]) -> None:
    """Puts every thread of this process on these processors; none: leaves them where they are."""
    for thread in Path("/proc/self/task").glob("*") if cores else ():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread.name), cores)

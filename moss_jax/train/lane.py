"""Steps of a recipe that are made beside the others, one after the other, each in a process of its own.

On a CPU two trainings, each in its own process, get through more than one after the other: what a small model's step
does not share among the cores, the other one uses.
"""

import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Protocol

from moss_jax.errors import MossError
from moss_jax.train.preemption import Preemption


class Beside(Protocol):
    name: str
    start: Callable[[], BaseProcess]


class Lane:
    """Begins when it is asked to; `done` is called with each step when it ended, its seconds and its exit code.

    Attributes:
        code: 0, or that of the step that stopped; the steps after it are not begun.
    """

    def __init__(self, done: Callable[[Beside, float, int], None]):
        self._done, self._left, self.code = done, [], 0
        self._lock, self._ended = threading.Lock(), False
        self._thread: threading.Thread | None = None
        self._process: BaseProcess | None = None

    def add(self, step: Beside) -> None:
        """Puts a step at the end; before `begin`."""
        self._left.append(step)

    def begin(self) -> None:
        """Starts the first step, unless that was done or there is none."""
        if self._left and self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def _work(self) -> None:
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

"""Notices that a run must end soon.

On one host SIGTERM, and Ctrl-C. On several, the service of jax.distributed: a notice to any of them makes all agree on
the step after which they end.
"""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preemption:
    """As a context manager it listens; `reached` says whether the run must end after a step."""

    def __init__(self):
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        # With several processes jax.distributed listens to SIGTERM itself; a handler of ours would take it away.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether a notice has come, as far as this process knows."""
        return self._asked

    def reached(self, step: int) -> bool:
        """Whether the run ends after `step`; every process calls it once for every step."""
        if jax.process_count() > 1:
            self._asked = self._asked or multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _notice(self, number, frame) -> None:
        if self._asked and number == signal.SIGINT:  # the second Ctrl-C: at once
            raise KeyboardInterrupt
        self._asked = True

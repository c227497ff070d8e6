"""Preemption notices: requests to end a run soon.

With one process these are SIGTERM and Ctrl-C. With several, the service of jax.distributed lets a notice to any of them
make all agree on the step after which they end.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Listens for notices while it is used as a context manager."""

    def __init__(self) -> None:
        self._asked = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        # With several processes jax.distributed handles SIGTERM itself; a handler of ours would replace its own.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether a notice has arrived, as far as this process knows."""
        return self._asked

    def reached(self, step: int) -> bool:
        """Whether the run ends after `step`; every process calls it once for every step."""
        if jax.process_count() > 1:
            self._asked = self._asked or multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:  # the second Ctrl-C ends the process at once
            raise KeyboardInterrupt
        self._asked = True

"""The limit on gradient norms: each update is compared with the updates before it."""

import math
import statistics
from typing import Any

from moss_jax.errors import MossError
from moss_jax.train.run import Guard

DELAY = 2  # when the limit of an update is needed, the metrics of the update before it are still on the device


class Watch:
    """The gradient norms of recent updates, and the number of updates skipped in a row.

    The limit of update s depends only on updates up to s - DELAY, so a resumed run has the same limits.
    """

    def __init__(self, guard: Guard):
        self._guard = guard
        self._norms: list[tuple[int, float]] = []  # (step, gradient norm)
        self._consecutive_skips = 0

    def limit(self, step: int) -> float:
        """The largest gradient norm that update `step` may have; inf when there is no limit."""
        if self._guard.spike is None:
            return math.inf
        norms = [norm for made, norm in self._norms if made <= step - DELAY][-self._guard.window :]
        if 2 * len(norms) < self._guard.window:
            return math.inf
        return self._guard.spike * statistics.median(norms)

    def add(self, step: int, norm: float, skipped: bool) -> str | None:
        """Records update `step`; returns the reason why the run must stop, or None."""
        if not skipped:
            self._consecutive_skips = 0
            self._norms = [*self._norms[-self._guard.window - DELAY :], (step, norm)]
            return None
        self._consecutive_skips += 1
        if self._guard.action == "stop":
            return "guard.action is 'stop'"
        if self._consecutive_skips >= self._guard.max_consecutive_skips:
            return f"{self._consecutive_skips} updates in a row were skipped"
        return None

    def state(self) -> dict[str, Any]:
        """The state as JSON, for `restore`."""
        return {"norms": self._norms, "row": self._consecutive_skips}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned. Raises MossError when it is something else."""
        try:
            self._norms = [(int(step), float(norm)) for step, norm in state["norms"]]
            self._consecutive_skips = int(state["row"])
        except (KeyError, TypeError, ValueError) as error:
            raise MossError(f"checkpoint: its record of gradient norms cannot be read ({error})") from error

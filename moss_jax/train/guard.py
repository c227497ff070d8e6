"""When a gradient is too large: the limit that each update must keep to, a function of the updates before it."""

import math
import statistics
from typing import Any

from moss_jax.errors import MossError
from moss_jax.train.run import Guard

LATE = 2  # the metrics of the update before are still on the device when a limit is needed


class Watch:
    """Gradient norms of the updates that were made, and how many in a row were not.

    The limit of update s depends on updates up to s - LATE alone, so a run that was resumed has the same limits.
    """

    def __init__(self, guard: Guard):
        self._guard = guard
        self._norms: list[tuple[int, float]] = []  # (step, gradient norm)
        self._row = 0  # updates skipped in a row

    def limit(self, step: int) -> float:
        """The largest gradient norm that update `step` may have; inf when there is no limit."""
        if self._guard.spike is None:
            return math.inf
        seen = [norm for made, norm in self._norms if made <= step - LATE][-self._guard.window :]
        if 2 * len(seen) < self._guard.window:
            return math.inf
        return self._guard.spike * statistics.median(seen)

    def add(self, step: int, norm: float, skipped: bool) -> str | None:
        """Takes note of update `step`; returns why the run must stop, or None."""
        if not skipped:
            self._row = 0
            self._norms = [*self._norms[-self._guard.window - LATE :], (step, norm)]
            return None
        self._row += 1
        if self._guard.action == "stop":
            return "guard.action is 'stop'"
        if self._row >= self._guard.max_consecutive_skips:
            return f"{self._row} updates in a row were skipped"
        return None

    def state(self) -> dict[str, Any]:
        """JSON, for `restore`."""
        return {"norms": self._norms, "row": self._row}

    def restore(self, state: dict[str, Any]) -> None:
        try:
            self._norms = [(int(step), float(norm)) for step, norm in state["norms"]]
            self._row = int(state["row"])
        except (KeyError, TypeError, ValueError) as error:
            raise MossError(f"checkpoint: its record of gradient norms cannot be read ({error})") from error

"""Progress lines: the callback that receives them, how often they are passed on, and how durations are written."""

import time
from collections.abc import Callable

Say = Callable[[str], None]  # receives one line of text, without a line break


def silent(line: str) -> None:
    """A `Say` that discards its lines."""


def duration(seconds: float) -> str:
    """12 ms, 3.4 s, 5 min, 7 h 30 min."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 99:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """A `Say` that passes on one line per interval and drops the others; lines that start with "note:" always pass.

    Args:
        say: receives the lines that pass.
        interval: seconds between two lines; 0: every line passes. The first interval starts now.
    """

    def __init__(self, say: Say, interval: float = 20.0):
        self._say = say
        self._interval = interval
        self._last = time.monotonic()

    def __call__(self, line: str, force: bool = False) -> None:
        """Passes the line on if it is due, a note, or forced (such as the last of a count)."""
        if line.startswith("note:"):
            self._say(line)
        elif force or time.monotonic() - self._last >= self._interval:
            self._say(line)
            self._last = time.monotonic()

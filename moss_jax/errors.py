"""The one error that people are meant to read, and how it shows the values that it names."""

import reprlib
from typing import Any

_short = reprlib.Repr()
_short.maxstring = 60
_short.maxother = 60
_short.maxlong = 60
_short.maxlevel = 3


class MossError(ValueError):
    """Bad input, reported in one line: what is wrong, where, and what would be right.

    Further lines may follow (a list of tensor names, say). Programmers catch it; the command line prints it on stderr
    and exits with code 2. Anything else that escapes is a bug of ours and keeps its traceback.
    """


def shown(value: Any) -> str:
    """A value for an error message: on one line, and cut where it is long."""
    try:
        return " ".join(_short.repr(value).split())
    except ValueError:  # Python refuses to print an int of more than 4300 digits
        return "a number of thousands of digits"

"""Checks of numbers that people give: on the command line, in Python, in a request or in a file."""

from numbers import Real
from typing import Any

from moss_jax.errors import MossError

MAX_SEED = 2**32 - 1
MAX_INT = 2**31 - 1  # what an int32 array can hold


def check_number(name: str, value: Any, lowest: float, highest: float) -> float:
    """`value` as a float; MossError unless it is a real number from `lowest` to `highest` (both are finite).

    numpy numbers are taken; bool, strings and arrays are not.
    """
    if not (_is_real(value) and lowest <= value <= highest):
        raise MossError(f"{name} is {shown(value)}, expected a number from {lowest:g} to {highest:g}")
    return float(value)


def check_whole(name: str, value: Any, lowest: int, highest: int = MAX_INT) -> int:
    """`value` as an int; MossError unless it is a whole number from `lowest` to `highest`.

    A float such as 20.0 is taken, because JSON and JavaScript do not tell it from 20; bool and strings are not.
    """
    if not (_is_real(value) and lowest <= value <= highest and value == int(value)):
        limits = f"at least {lowest}" if highest == MAX_INT else f"{lowest} to {highest}"
        raise MossError(f"{name} is {shown(value)}, expected {limits}, a whole number")
    return int(value)


def check_seed(seed: Any, name: str = "seed") -> int:
    """`seed` as an int; MossError unless it is a whole number of 32 bits."""
    return check_whole(name, seed, 0, MAX_SEED)


def shown(value: Any) -> str:
    """`value` for an error: on one line, and cut when it is long."""
    try:
        text = " ".join(repr(value).split()) if not isinstance(value, Real) else str(value)
    except ValueError:  # Python refuses to print an int of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)

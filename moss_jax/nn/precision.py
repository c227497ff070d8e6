"""Computation in 32 bits in a process that has switched JAX to 64."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_32_bits(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function with JAX's 64-bit mode (JAX_ENABLE_X64) off while it runs.

    The models are float32 with int32 positions. In 64-bit mode JAX makes constants float64 and int64: functions then
    fail, or give results that differ from those in any other process.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        with jax.enable_x64(False):
            return function(*args, **keywords)

    return run

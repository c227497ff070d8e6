"""Computing in 32 bits where the caller's process has switched jax to 64."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def in_32_bits(function: Callable) -> Callable:
    """The function with jax's 64-bit mode (JAX_ENABLE_X64) off while it runs.

    The models are float32 with int32 positions. In 64-bit mode jax makes float64 and int64 of every constant, and the
    results would differ from those of everybody else where they do not fail.
    """

    @functools.wraps(function)
    def run(*args: Any, **keywords: Any) -> Any:
        with jax.enable_x64(False):
            return function(*args, **keywords)

    return run

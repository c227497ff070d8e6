"""Counts XLA compilations, through the events that JAX publishes."""

import contextlib
import re
from collections.abc import Iterator

import jax

EVENT = "/jax/core/compile/backend_compile_duration"  # also sent when the program comes from the persistent cache


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list of the names of the functions that are compiled within the context, in order.

    Operations outside `jax.jit` are compiled too, and have names such as "broadcast_in_dim". A function that this
    process has compiled before for the same shapes is not compiled again.
    """
    names: list[str] = []

    def listen(event: str, seconds: float, **facts: str | int) -> None:
        if event == EVENT:
            # "jit_name" or "jit(name)", depending on the version of JAX
            names.append(re.sub(r"^jit[_(](.*?)\)?$", r"\1", str(facts["fun_name"])))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

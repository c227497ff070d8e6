"""Several processes as one run."""

import jax

from moss_jax.errors import MossError


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several; call it before anything else of JAX.

    On TPU pods, Slurm and the like JAX finds out by itself; elsewhere all three are given.

    Args:
        coordinator: "host:port" of process 0.
        processes: how many there are.
        process: which one this is.
    """
    told = (coordinator, processes, process)
    if any(value is None for value in told) and any(value is not None for value in told):
        raise MossError("--coordinator, --processes and --process: give all three, or none where JAX finds out itself")
    if coordinator is not None and not 0 <= process < processes:
        raise MossError(f"--process {process}: expected 0 to {processes - 1}")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise MossError(f"--distributed: {first}; give --coordinator, --processes and --process") from error

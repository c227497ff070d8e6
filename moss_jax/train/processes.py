"""Several processes in one run."""

import jax

from moss_jax.errors import MossError


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several; call it before any other function of JAX.

    On TPU pods, with Slurm and the like JAX detects the processes by itself; elsewhere all three arguments are needed.

    Args:
        coordinator: "host:port" of process 0.
        processes: how many there are.
        process: which one this is, from 0.

    Raises:
        MossError: some of the arguments are missing or wrong, or JAX cannot connect the processes.
    """
    if coordinator is not None and processes is not None and process is not None:
        if not 0 <= process < processes:
            raise MossError(f"--process {process}: expected 0 to {processes - 1}")
    elif (coordinator, processes, process) != (None, None, None):
        raise MossError("--coordinator, --processes and --process: give all three, or none where JAX detects them")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise MossError(f"--distributed: {first}; give --coordinator, --processes and --process") from error

"""Compiles in a child process: the TPU compiler needs environment variables that must not affect the caller.

The compiler is part of libtpu and runs on any machine.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from moss_jax.compile.request import CompileRequest
from moss_jax.errors import MossError
from moss_jax.progress import Say

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any known type; the topology is given by name
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so other processes may compile at the same time
}


def compile_function(request: CompileRequest, say: Say = lambda line: None, every: float = 30.0) -> dict[str, Any]:
    """Compiles in a child process and returns the report of `moss_jax.compile.measure.measure`.

    Args:
        say: receives a progress message every `every` seconds.

    Raises:
        MossError: unknown function, size or topology, a mesh that does not fit the topology, or no libtpu.
    """
    request.check()
    with tempfile.TemporaryDirectory() as dump:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_hlo_as_text"
        command = [sys.executable, "-m", "moss_jax.compile.measure", json.dumps(dataclasses.asdict(request)), dump]
        environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": flags}
        with _progress(f"compiling {request.function} for {request.topology}", say, every):
            child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode == 2:
        raise MossError(child.stdout.strip())
    if child.returncode:
        raise RuntimeError(f"compiling failed with exit code {child.returncode}:\n{child.stderr[-4000:]}")
    return json.loads(child.stdout.splitlines()[-1])


@contextlib.contextmanager
def _progress(what: str, say: Say, every: float) -> Iterator[None]:
    """Reports every `every` seconds how long the block has been running."""
    start = time.monotonic()
    done = threading.Event()

    def report() -> None:
        while not done.wait(every):
            say(f"{what}: {time.monotonic() - start:.0f} s so far")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()

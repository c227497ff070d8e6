"""Compiles in this process and reports memory and collectives; `compile_function` runs it as a child process.

    python -m moss_jax.compile.measure REQUEST_JSON DUMP_FOLDER

Prints the report as JSON. Exit code 2: the request is wrong, and the message is on stdout.
"""

import dataclasses
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from moss_jax.compile.functions import build
from moss_jax.compile.hlo import collectives
from moss_jax.compile.request import TRAINING_FIELDS, CompileRequest
from moss_jax.compile.topology import CHIP_GIB, generation, topology_mesh
from moss_jax.errors import MossError

GIB = 2**30


def measure(request: CompileRequest, dump: Path) -> dict[str, Any]:
    """Memory in GiB and collectives, both of one chip, and the compiler's times in seconds.

    Args:
        dump: the folder of the flag `xla_dump_to`, with the text of programs that jax itself cannot print.
    """
    family = generation(request.topology)
    mesh = topology_mesh(request)
    with jax.set_mesh(mesh):
        function, args = build(request, mesh)
        start = time.perf_counter()
        lowered = function.lower(*args)
        lower_seconds = time.perf_counter() - start
        result = {
            **_request_fields(request),
            "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
            "chips": mesh.size,
            "versions": {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
            **_step_estimate(request, mesh.size, family),
            "lower_seconds": round(lower_seconds, 1),
        }
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return result | {"fits": False, "compiler": str(error).splitlines()[0]}
    result["compile_seconds"] = round(time.perf_counter() - start - lower_seconds, 1)
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return result | {
        "argument_gib": round(memory.argument_size_in_bytes / GIB, 3),
        "temporary_gib": round(memory.temp_size_in_bytes / GIB, 3),
        "output_gib": round(memory.output_size_in_bytes / GIB, 3),
        "output_in_place_gib": round(memory.alias_size_in_bytes / GIB, 3),
        "total_gib": round(peak / GIB, 3),
        "chip_gib": CHIP_GIB.get(family),
        "fits": peak / GIB <= CHIP_GIB[family] if family in CHIP_GIB else None,
        "collectives": collectives(_program_text(compiled, dump)),
    }


def _request_fields(request: CompileRequest) -> dict[str, Any]:
    fields = dataclasses.asdict(request)
    return {name: value for name, value in fields.items() if request.is_training or name not in TRAINING_FIELDS}


def _step_estimate(request: CompileRequest, chips: int, family: str) -> dict[str, Any]:
    if not request.is_training:
        return {}
    from moss_jax.compile.training import step_estimate

    return step_estimate(request, chips, family)


def _program_text(compiled: jax.stages.Compiled, dump: Path) -> str:
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        # Programs for v5p contain asynchronous instructions of libtpu that jax refuses to read.
        return max(dump.glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size).read_text()


if __name__ == "__main__":
    try:
        print(json.dumps(measure(CompileRequest(**json.loads(sys.argv[1])), Path(sys.argv[2]))))
    except MossError as error:
        print(error)
        sys.exit(2)

"""The mesh of a TPU topology that is known by name only."""

import re

import jax
from jax.experimental import topologies

from moss_jax.compile.request import TOPOLOGY_EXAMPLES, CompileRequest
from moss_jax.errors import MossError
from moss_jax.sharding import make_mesh

# GiB of memory of a chip that a program may use, as libtpu reports it when a program does not fit.
CHIP_GIB = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}


def generation(topology: str) -> str:
    """The chip generation in the name of a topology: "v5e" of "v5e:2x4"."""
    return re.split(r"[:=_]", topology)[0]


def topology_mesh(request: CompileRequest) -> jax.sharding.Mesh:
    """A mesh of the devices of the topology; the free axis takes the devices that the others leave.

    Raises:
        MossError: libtpu does not know the topology, or the axes do not multiply to its devices.
    """
    try:
        devices = topologies.get_topology_desc(topology_name=request.topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise MossError(f"unknown topology {request.topology!r} ({reason}), expected {TOPOLOGY_EXAMPLES}") from error
    return make_mesh(**_axis_sizes(request, len(devices)), devices=devices)


def _axis_sizes(request: CompileRequest, devices: int) -> dict[str, int]:
    if request.function.startswith("codec"):
        return {"data": devices}
    sizes = {"data": request.data, "fsdp": request.fsdp, "tensor": request.tensor}
    if request.is_training:
        sizes["tensor"] = max(1, request.tensor)
        rest = devices // (request.data * request.fsdp * sizes["tensor"])
        sizes["sequence"] = request.sequence or max(1, rest)
    elif not request.tensor:
        sizes["tensor"] = max(1, devices // (request.data * request.fsdp))
    return sizes

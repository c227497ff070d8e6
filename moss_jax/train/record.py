"""What is written beside the arrays of a checkpoint, and whether a run may go on from it."""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moss_jax.errors import MossError

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def check_record(
    found: Mapping[str, Any], expected: Mapping[str, Any], where: Path, say: Callable[[str], None]
) -> None:
    """Raises MossError when a checkpoint is of another architecture, stage or whatever else `expected` has (a
    `Task.described` and the `fingerprint` of the frozen parameters); says when frozen weights are others."""
    for part, want in expected.items():
        if part == "frozen":
            continue
        have = found.get(part) or {}
        names = [name for name in want if have.get(name) != want[name] and not name.endswith("_weight")]
        if names:
            differs = [f"{name} is {have.get(name)!r}, this run's is {want[name]!r}" for name in names]
            told = f"{where}: of another {part} ({differs[0]}); give the run another folder, or the same {part}"
            raise MossError("\n  ".join([told, *differs[1:]]))
    if found.get("frozen") != expected["frozen"]:
        say(f"note: {where} was trained beside other frozen weights: init, or how they are held, is not what it was")


def fingerprint(flat: Mapping[str, jax.Array]) -> int:
    """A number that changes with any bit of the arrays, and not with how they lie on devices."""
    if not flat:
        return 0
    sums = jax.device_get(_sums(dict(flat)))
    return zlib.crc32(json.dumps({path: int(value) for path, value in sums.items()}, sort_keys=True).encode())


@jax.jit
def _sums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums modulo 2^32, in which every entry has an odd factor that depends on its place."""

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            place = place * jnp.uint32(1000003) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)

    return {path: one(x) for path, x in flat.items()}

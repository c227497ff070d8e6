"""LoRA: low-rank adapters beside kernels that do not train.

A kernel W [*in, *out] with an adapter computes x W + alpha / rank (x A) B, A [*in, rank], B [rank, *out]; B starts at
zero. The adapter of the stacked kernel `shared/layers/mlp/up/kernel` is `lora/shared/layers/mlp/up/a` and `.../b`, a
stack as well: the collection "lora" of `moss_jax.nn.layers.Linear`. Source: Hu et al., arXiv 2106.09685.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from moss_jax.errors import MossError

PREFIX = "lora/"
IN_DIMS = {"o": 2}  # kernels that contract more than their first axis: the output projection [N, H, D]


@dataclass(frozen=True)
class Lora:
    """Which kernels get adapters, and of which size."""

    rank: int = 16
    alpha: float = 32.0  # the adapter's product is scaled by alpha / rank
    targets: tuple[str, ...] = ("*/layers/*/kernel",)  # glob patterns over kernel paths; `*` also matches '/'

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def select(self, paths) -> list[str]:
        """The kernels that get adapters; raises MossError when a pattern matches none, or something else."""
        selected = []
        for pattern in self.targets:
            found = [path for path in paths if fnmatchcase(path, pattern)]
            if not found:
                raise MossError(f"lora: target {pattern!r} matches no frozen parameter, such as {min(paths)}")
            if wrong := [path for path in found if not (path.endswith("/kernel") and "/layers/" in path)]:
                raise MossError(f"lora: target {pattern!r} matches {wrong[0]}, expected kernels of layers only")
            selected += [path for path in found if path not in selected]
        return selected


def is_adapter(path: str) -> bool:
    return path.startswith(PREFIX)


def new_adapters(lora: Lora, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, jax.Array]:
    """Flat {path: float32} of the adapters for kernels {path: shape}: A normal with variance 1 / inputs, B zero."""
    if lora.rank < 1:
        raise MossError(f"lora: rank is {lora.rank}, expected at least 1")
    adapters = {}
    for path in lora.select(shapes):
        layers, ins, outs = _parts(path, shapes[path])
        base = PREFIX + path.removesuffix("kernel")
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        a = jax.random.normal(key, (layers, *ins, lora.rank), jnp.float32) / math.sqrt(math.prod(ins))
        adapters |= {base + "a": a, base + "b": jnp.zeros((layers, lora.rank, *outs), jnp.float32)}
    return adapters


def adapter_axes(path: str, axes: Mapping[str, tuple[str | None, ...]]) -> tuple[str | None, ...]:
    """Logical axes of an adapter from those of all kernels; the rank is never divided."""
    base, _, part = path.removeprefix(PREFIX).rpartition("/")
    layers, ins, outs = _parts(f"{base}/kernel", axes[f"{base}/kernel"])
    return (layers, *ins, None) if part == "a" else (layers, None, *outs)


def scaled(lora: Lora, adapters: Mapping[str, jax.Array], dtype: Any) -> dict[str, jax.Array]:
    """Flat {path without prefix: array} for the collection "lora": the scale is in B, both in the compute dtype."""
    out = {}
    for path, value in adapters.items():
        value = value * lora.scale if path.endswith("/b") else value
        out[path.removeprefix(PREFIX)] = value.astype(dtype)
    return out


def merged(lora: Lora, trainable: Mapping[str, jax.Array], flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Flat {path: W + alpha / rank A B} of the kernels with adapters, in the dtype of W; the sum is float32.

    A function of the arrays alone: merging twice gives the same bytes.
    """
    out = {}
    for path in (path for path in trainable if is_adapter(path) and path.endswith("/a")):
        target = path.removeprefix(PREFIX)[:-1] + "kernel"
        out[target] = _merge(flat[target], trainable[path], trainable[path[:-1] + "b"], lora.scale)
    return out


@jax.jit
def _merge(kernel, a, b, scale):
    def one(_, layer):
        w, a, b = layer
        product = jnp.tensordot(a, b, 1, precision="highest")
        return None, (w.astype(jnp.float32) + scale * product).astype(w.dtype)

    return jax.lax.scan(one, None, (kernel, a, b))[1]


def _parts(path: str, items: tuple) -> tuple[Any, tuple, tuple]:
    """(layers, inputs, outputs) of a stacked kernel's shape or axes."""
    ins = 1 + IN_DIMS.get(path.split("/")[-2], 1)
    return items[0], tuple(items[1:ins]), tuple(items[ins:])

"""LoRA: low-rank adapters of frozen kernels.

A kernel W [*in, *out] with an adapter computes x W + alpha / rank (x A) B, A [*in, rank], B [rank, *out]; B starts at
zero. The adapter of the stacked kernel `shared/layers/mlp/up/kernel` is `lora/shared/layers/mlp/up/a` and `.../b`,
stacked as well: the collection "lora" of `moss_jax.nn.layers.Linear`. Source: Hu et al., arXiv 2106.09685.
"""

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
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
    """Which kernels get adapters, and of which size. The defaults are common choices: alpha twice the rank."""

    rank: int = 16
    alpha: float = 32.0  # the adapter's product is scaled by alpha / rank
    targets: tuple[str, ...] = ("*/layers/*/kernel",)  # glob patterns over kernel paths; `*` also matches '/'

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def select(self, paths: Collection[str]) -> list[str]:
        """The kernels that get adapters; raises MossError if a pattern matches none, or something else."""
        selected: list[str] = []
        for pattern in self.targets:
            matches = [path for path in paths if fnmatchcase(path, pattern)]
            if not matches:
                raise MossError(f"lora: target {pattern!r} matches no frozen parameter, such as {min(paths)}")
            if wrong := [path for path in matches if not (path.endswith("/kernel") and "/layers/" in path)]:
                raise MossError(f"lora: target {pattern!r} matches {wrong[0]}, expected kernels of layers only")
            selected += [path for path in matches if path not in selected]
        return selected


def is_adapter(path: str) -> bool:
    return path.startswith(PREFIX)


def new_adapters(lora: Lora, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, jax.Array]:
    """Flat {path: float32} of the adapters for kernels {path: shape}: A normal with variance 1 / inputs, B zero."""
    if lora.rank < 1:
        raise MossError(f"lora: rank is {lora.rank}, expected at least 1")
    adapters: dict[str, jax.Array] = {}
    for path in lora.select(shapes):
        layers, ins, outs = _parts(path, shapes[path])
        base = PREFIX + path.removesuffix("kernel")
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        a = jax.random.normal(key, (layers, *ins, lora.rank), jnp.float32) / math.sqrt(math.prod(ins))
        adapters[base + "a"] = a
        adapters[base + "b"] = jnp.zeros((layers, lora.rank, *outs), jnp.float32)
    return adapters


def adapter_axes(path: str, axes: Mapping[str, tuple[str | None, ...]]) -> tuple[str | None, ...]:
    """Logical axes of an adapter from those of all kernels; the rank is never sharded."""
    base, _, part = path.removeprefix(PREFIX).rpartition("/")
    layers, ins, outs = _parts(f"{base}/kernel", axes[f"{base}/kernel"])
    return (layers, *ins, None) if part == "a" else (layers, None, *outs)


def scaled(lora: Lora, adapters: Mapping[str, jax.Array], dtype: Any) -> dict[str, jax.Array]:
    """Flat {path without prefix: array in `dtype`} for the collection "lora"; B is multiplied by the scale."""
    collection = {}
    for path, value in adapters.items():
        if path.endswith("/b"):
            value = value * lora.scale
        collection[path.removeprefix(PREFIX)] = value.astype(dtype)
    return collection


def merged(lora: Lora, trainable: Mapping[str, jax.Array], flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Flat {path: W + alpha / rank A B} of the kernels with adapters, in the dtype of W; the sum is float32.

    Deterministic: merging the same arrays again gives the same bytes.
    """
    kernels = {}
    for path, a in trainable.items():
        if not (is_adapter(path) and path.endswith("/a")):
            continue
        base = path.removesuffix("a")
        target = base.removeprefix(PREFIX) + "kernel"
        kernels[target] = _merge(flat[target], a, trainable[base + "b"], lora.scale)
    return kernels


@jax.jit
def _merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Layer by layer, so that one float32 kernel exists at a time."""

    def merge_layer(_: None, layer: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        w, a, b = layer
        product = jnp.tensordot(a, b, 1, precision="highest")
        return None, (w.astype(jnp.float32) + scale * product).astype(w.dtype)

    _, merged_kernel = jax.lax.scan(merge_layer, None, (kernel, a, b))
    return merged_kernel


def _parts(path: str, items: Sequence[Any]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """(layers, inputs, outputs) of a stacked kernel's shape or axes."""
    ins = 1 + IN_DIMS.get(path.split("/")[-2], 1)
    return items[0], tuple(items[1:ins]), tuple(items[ins:])

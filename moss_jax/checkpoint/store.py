"""Parameter trees on disk: safetensors under their flat paths, loaded onto devices part by part."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_jax.checkpoint.old_names import with_current_names
from moss_jax.checkpoint.safetensors import SHARD_BYTES, FileWriter, TensorReader, TensorWriter, open_tensors
from moss_jax.errors import MossError
from moss_jax.files import atomic_file
from moss_jax.nn.tree import flatten, unflatten


def save_tensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file, {name: array} and string metadata, whole or not at all.

    Raises:
        MossError: the file cannot be written.
    """
    with atomic_file(path) as part, FileWriter(part, tensors, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, np.asarray(tensor))


def save_tree(folder: str | Path, tree: Mapping[str, Any], stem: str = "model", shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a parameter tree into an existing folder, one parameter in host memory at a time.

    Args:
        folder: use `atomic_folder` to write it whole or not at all.
        tree: nested or flat dictionaries of numpy or jax arrays.
        stem: the file's name without `.safetensors`.
        shard_bytes: above this size several files and an index are written.
    """
    flat = flatten(tree)
    with TensorWriter(folder, flat, stem, shard_bytes=shard_bytes) as writer:
        for path, leaf in flat.items():
            writer.write(path, np.asarray(leaf))


def load_tree(
    source: str | Path,
    shapes: Mapping[str, Any],
    sharding: Mapping[str, jax.sharding.Sharding] | jax.sharding.Sharding | None = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """Loads a parameter tree onto devices.

    Args:
        source: a safetensors file, an index of shards, or a folder with one of them.
        shapes: flat {path: anything with .shape} of the model's parameters.
        sharding: one sharding, or one for each path; each device receives only its part of the file. None: everything
            goes to the default device.
        dtype: converts floating-point parameters to this dtype; None keeps what the file has.

    Returns:
        Nested dictionaries of jax arrays.

    Raises:
        MossError: the file cannot be read, or its parameters do not fit, see `check_shapes`.
    """
    reader = with_current_names(open_tensors(source), shapes)
    check_shapes(reader.shapes(), {path: tuple(leaf.shape) for path, leaf in shapes.items()}, reader.path)
    flat = {}
    for path in shapes:
        where = sharding[path] if isinstance(sharding, Mapping) else sharding
        flat[path] = _place(reader, path, where, dtype)
    return unflatten(flat)


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str | Path
) -> None:
    """Checks the {path: shape} of a file against those of a model.

    Raises:
        MossError: names every missing, unexpected and misshapen parameter.
    """
    problems = [f"missing: {path} {list(shape)}" for path, shape in expected.items() if path not in found]
    for path, shape in found.items():
        if path not in expected:
            problems.append(f"unexpected: {path} {list(shape)}")
        elif tuple(shape) != expected[path]:
            problems.append(f"misshapen: {path} is {list(shape)}, expected {list(expected[path])}")
    if problems:
        count = f"{len(problems)} parameter{'s do' if len(problems) > 1 else ' does'}"
        raise MossError("\n  ".join([f"{where}: {count} not fit the model its config describes", *sorted(problems)]))


def _place(reader: TensorReader, path: str, sharding: jax.sharding.Sharding | None, dtype: Any) -> jax.Array:
    view = reader.read(path)
    convert = _converter(view.dtype, dtype)
    if sharding is None:
        array: jax.Array = jax.device_put(convert(view))
        return array
    return jax.make_array_from_callback(view.shape, sharding, lambda index: convert(view[index]))


def _converter(have: np.dtype, want: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A function that copies a part of the mapped file, to the wanted dtype. JAX could otherwise use the mapped memory
    itself on a CPU, and the file may change."""
    if want is not None and jax.numpy.issubdtype(have, jax.numpy.floating):
        return lambda part: np.array(part, np.dtype(want), order="C")
    return lambda part: np.array(part, order="C")

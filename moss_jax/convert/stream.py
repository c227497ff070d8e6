"""Checkpoints through a name table, one parameter at a time, in both directions.

A source is anything with `path`, `tensors` {name: has .shape, .dtype, .nbytes} and `read(name)`: a `TensorReader`, or
`MemoryTensors` for formats that cannot be read in parts. What is in memory at any time is one stacked parameter and
one tensor of it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from moss_jax.checkpoint import TensorReader, TensorWriter, check_shapes
from moss_jax.checkpoint.old_names import with_current_names
from moss_jax.checkpoint.safetensors import SHARD_BYTES, TensorInfo
from moss_jax.convert.table import NameTable, TableEntry
from moss_jax.errors import MossError

Say = Callable[[str], None]


class TensorSource(Protocol):
    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def read(self, name: str) -> np.ndarray: ...


class MemoryTensors:
    """Tensors that are in memory, as a source."""

    def __init__(self, path: str | Path, tensors: Mapping[str, np.ndarray]):
        self.path = Path(path)
        self.tensors = dict(tensors)

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def tensor_shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}


def with_dtypes(source: TensorSource, entries: Iterable[TableEntry]) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape of ours with the dtype of the file}; a stack of tensors with different dtypes is an error."""
    shapes = {}
    mixed = []
    for entry in entries:
        dtypes = {np.dtype(source.tensors[name].dtype) for name in entry.names.flat}
        if len(dtypes) > 1:
            mixed.append(f"{entry.names.flat[0]} and others: {', '.join(sorted(map(str, dtypes)))}")
        shapes[entry.path] = jax.ShapeDtypeStruct(entry.shape, next(iter(dtypes)))
    if mixed:
        raise MossError(
            "\n  ".join([f"{source.path}: layers of one kind have different dtypes, expected one for all", *mixed])
        )
    return shapes


def import_tensors(
    source: TensorSource,
    table: NameTable,
    shapes: Mapping[str, Any],
    folder: Path,
    stem: str = "model",
    carried: Path | None = None,
    say: Say = lambda line: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a foreign checkpoint in our layout.

    Args:
        source: the foreign tensors.
        table: where each lives in our tree.
        shapes: flat {path: has .shape} of our parameters.
        folder, stem: of our safetensors file(s); the dtype of every tensor is kept.
        carried: the safetensors file for tensors that the table carries unused; written only if there are any.
        say: gets a line of progress now and then.

    Raises:
        MossError: the full list of unmapped, missing and misshapen tensors.
    """
    table.check(tensor_shapes(source), shapes, str(source.path))
    entries = table.entries(shapes)
    ours = with_dtypes(source, entries)
    progress = CopyProgress(say, f"writing {stem}", ours)
    with TensorWriter(folder, ours, stem, shard_bytes=shard_bytes) as writer:
        for entry in entries:
            writer.write(entry.path, entry.to_ours(source.read))
            progress.add(ours[entry.path])
    used = {name for entry in entries for name in entry.names.flat}
    unused = {name: tensor for name, tensor in source.tensors.items() if name not in used}
    if unused and carried is not None:
        carried.parent.mkdir(parents=True, exist_ok=True)
        stem = carried.name.removesuffix(".safetensors")
        with TensorWriter(carried.parent, unused, stem, shard_bytes=1 << 62) as writer:
            for name in unused:
                writer.write(name, source.read(name))


def exported_tensors(ours: TensorReader, table: NameTable, shapes: Mapping[str, Any]) -> "ExportedTensors":
    """Our file as a source of foreign tensors; checks it against `shapes` first."""
    ours = with_current_names(ours, shapes)
    check_shapes(ours.shapes(), {path: tuple(leaf.shape) for path, leaf in shapes.items()}, ours.path)
    typed = {path: jax.ShapeDtypeStruct(leaf.shape, ours.tensors[path].dtype) for path, leaf in shapes.items()}
    return ExportedTensors(ours, table.entries(typed))


class ExportedTensors:
    """Foreign tensors made from our file: a source whose tensors are cut out of our stacked parameters."""

    def __init__(self, ours: TensorReader, entries: list[TableEntry]):
        self.path = ours.path
        self._ours = ours
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[TableEntry, tuple[int, ...]]] = {}
        for entry in entries:
            for index in np.ndindex(entry.names.shape):
                name = str(entry.names[index])
                self.tensors[name] = TensorInfo(ours.path, entry.source_shape, np.dtype(entry.dtype), 0)
                self._places[name] = (entry, index)

    def read(self, name: str) -> np.ndarray:
        entry, index = self._places[name]
        return np.ascontiguousarray(entry.transform.to_theirs(self._ours.read(entry.path)[index]))


class MergedTensors:
    """Several sources as one; the same name may not stand in two of them."""

    def __init__(self, *sources: TensorSource):
        self.path = sources[0].path
        self._home = {}
        self.tensors = {}
        for source in sources:
            for name, tensor in source.tensors.items():
                if name in self._home:
                    raise MossError(f"{source.path}: carried tensor {name!r} is a parameter of the model as well")
                self._home[name] = source
                self.tensors[name] = tensor

    def read(self, name: str) -> np.ndarray:
        return self._home[name].read(name)


def write_source(
    source: TensorSource,
    folder: Path,
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
    say: Say = lambda line: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes every tensor of a source into safetensors, one at a time."""
    progress = CopyProgress(say, f"writing {stem}", source.tensors)
    with TensorWriter(folder, source.tensors, stem, metadata, shard_bytes) as writer:
        for name, tensor in source.tensors.items():
            writer.write(name, source.read(name))
            progress.add(tensor)


@dataclasses.dataclass
class CopyProgress:
    """Says how far a long piece of work is, at every twentieth of its bytes; silent when it is below 1 GB."""

    say: Say
    what: str
    tensors: Mapping[str, Any]

    def __post_init__(self):
        self._total = sum(_nbytes(tensor) for tensor in self.tensors.values())
        self._done = 0

    def add(self, tensor: Any) -> None:
        before = self._done
        self._done = self._done + _nbytes(tensor)
        if self._total >= 1e9 and 20 * before // self._total != 20 * self._done // self._total:
            self.say(f"{self.what}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB")


def _nbytes(tensor: Any) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize

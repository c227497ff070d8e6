"""Converts checkpoints through a name table, one parameter at a time, in both directions.

At most one stacked parameter and one tensor of it are in memory, unless the format of a file must be read as a whole.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from moss_jax.checkpoint import TensorReader, TensorWriter, check_shapes
from moss_jax.checkpoint.old_names import with_current_names
from moss_jax.checkpoint.safetensors import SHARD_BYTES, TensorInfo
from moss_jax.convert.table import NameTable, TableEntry
from moss_jax.errors import MossError
from moss_jax.progress import Say

ONE_FILE = 1 << 62  # bytes of a shard that is never full


class TensorSource(Protocol):
    """Named tensors that can be read one at a time, such as a `TensorReader`.

    Attributes:
        path: the file, for messages.
        tensors: {name: object with shape and dtype}.
    """

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def read(self, name: str) -> np.ndarray: ...


class MemoryTensors:
    """Tensors in memory, of formats that cannot be read in parts."""

    def __init__(self, path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
        self.path = Path(path)
        self.tensors = dict(tensors)

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def tensor_shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors of a source."""
    return {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}


def with_dtypes(source: TensorSource, entries: Iterable[TableEntry]) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape of our parameter, with the dtype of its tensors in the source}.

    Raises:
        MossError: tensors of one stacked parameter have different dtypes.
    """
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    mixed: list[str] = []
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
    """Writes a released checkpoint in our layout. Dtypes are kept.

    Args:
        source: the released tensors.
        table: maps them to our parameters.
        shapes: flat {path: object with shape} of our parameters.
        folder, stem: folder and start of the file names of our safetensors files.
        carried: safetensors file for the unused tensors that the table carries; written only if there are any.
        say: receives progress messages.

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
        with TensorWriter(carried.parent, unused, stem, shard_bytes=ONE_FILE) as writer:
            for name in unused:
                writer.write(name, source.read(name))


def exported_tensors(ours: TensorReader, table: NameTable, shapes: Mapping[str, Any]) -> "ExportedTensors":
    """Our file as a source of released tensors. Raises MossError if its parameters do not have these shapes."""
    ours = with_current_names(ours, shapes)
    check_shapes(ours.shapes(), {path: tuple(leaf.shape) for path, leaf in shapes.items()}, ours.path)
    typed = {path: jax.ShapeDtypeStruct(leaf.shape, ours.tensors[path].dtype) for path, leaf in shapes.items()}
    return ExportedTensors(ours, table.entries(typed))


class ExportedTensors:
    """A source of released tensors that are slices of the parameters in our file."""

    def __init__(self, ours: TensorReader, entries: Iterable[TableEntry]) -> None:
        self.path = ours.path
        self.tensors: dict[str, TensorInfo] = {}
        self._ours = ours
        self._slices: dict[str, tuple[TableEntry, tuple[int, ...]]] = {}  # of a parameter, by tensor name
        for entry in entries:
            for index in np.ndindex(entry.names.shape):
                name = str(entry.names[index])
                self.tensors[name] = TensorInfo(ours.path, entry.source_shape, np.dtype(entry.dtype), 0)
                self._slices[name] = (entry, index)

    def read(self, name: str) -> np.ndarray:
        entry, index = self._slices[name]
        return np.ascontiguousarray(entry.transform.to_theirs(self._ours.read(entry.path)[index]))


class MergedTensors:
    """Several sources as one. Raises MossError if a name occurs in two of them."""

    def __init__(self, *sources: TensorSource) -> None:
        self.path = sources[0].path
        self.tensors: dict[str, Any] = {}
        self._source_of: dict[str, TensorSource] = {}
        for source in sources:
            for name, tensor in source.tensors.items():
                if name in self._source_of:
                    raise MossError(f"{source.path}: carried tensor {name!r} is also a parameter of the model")
                self._source_of[name] = source
                self.tensors[name] = tensor

    def read(self, name: str) -> np.ndarray:
        return self._source_of[name].read(name)


def write_source(
    source: TensorSource,
    folder: Path,
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
    say: Say = lambda line: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes all tensors of a source to safetensors files, one tensor at a time."""
    progress = CopyProgress(say, f"writing {stem}", source.tensors)
    with TensorWriter(folder, source.tensors, stem, metadata, shard_bytes) as writer:
        for name, tensor in source.tensors.items():
            writer.write(name, source.read(name))
            progress.add(tensor)


@dataclasses.dataclass
class CopyProgress:
    """Reports progress after every 5 % of the bytes; nothing is reported below 1 GB."""

    say: Say
    what: str
    tensors: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._total = sum(_nbytes(tensor) for tensor in self.tensors.values())
        self._done = 0

    def add(self, tensor: Any) -> None:
        before = self._done
        self._done += _nbytes(tensor)
        if self._total >= 1e9 and 20 * before // self._total != 20 * self._done // self._total:
            self.say(f"{self.what}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB")


def _nbytes(tensor: Any) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize

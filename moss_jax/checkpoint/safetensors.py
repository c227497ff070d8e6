"""safetensors files: a reader that maps one tensor at a time, and a writer that never holds more than one.

A file is eight bytes with the length of a JSON header, the header, and the bytes of the tensors. The header is checked
against the size of the file before any tensor is read, so that a truncated or damaged file is reported by name. A
sharded checkpoint has a `*.safetensors.index.json`, whose `weight_map` maps each tensor name to its file.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from moss_jax.documents import located, parse_object, read_json, short, shown
from moss_jax.errors import MossError
from moss_jax.files import is_file, is_folder

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_RANK = 32  # numpy's maximum before version 2
MAX_ELEMENTS = 2**59  # without dimensions of size 0; 8 bytes each are 2**62, and numpy refuses 2**63
SHARD_BYTES = 5_000_000_000  # the usual size on the Hugging Face Hub


@dataclass(frozen=True)
class TensorInfo:
    """The place of one tensor: bytes [start, start + nbytes) of `file`."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorReader:
    """The tensors of one safetensors file or of one sharded checkpoint. Only `read` reads them.

    Attributes:
        path: the file, or the index of the shards.
        tensors: {name: TensorInfo}.
        metadata: the string metadata in the header; for a sharded checkpoint, that of the index.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, Any]):
        self.path = path
        self.tensors = tensors
        self.metadata = metadata

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor in the memory-mapped file, which is unmapped with the last reference to it."""
        info = self.tensors[name]
        if info.nbytes == 0:
            return np.empty(info.shape, info.dtype)
        mapped = np.memmap(info.file, np.uint8, "r", offset=info.start, shape=(info.nbytes,))
        return mapped.view(np.ndarray).view(info.dtype).reshape(info.shape)

    def files(self) -> set[Path]:
        """The files of the tensors, and the index."""
        return {self.path, *(info.file for info in self.tensors.values())}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def open_tensors(path: str | Path) -> TensorReader:
    """Opens a safetensors file, an index of shards, or a folder with one of the two.

    In a folder, `model.safetensors` comes first, then `model.safetensors.index.json`, then the only file of any other
    name.

    Raises:
        MossError: a file or a shard is missing, truncated or damaged, or the index and the shards disagree.
    """
    path = Path(path)
    if is_folder(path):
        path = _find(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    metadata, tensors = read_header(path)
    return TensorReader(path, tensors, metadata)


def read_header(path: str | Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The metadata and the tensors in the header of a safetensors file, checked against the size of the file.

    Raises:
        MossError: the file is missing, truncated or damaged.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(MAX_HEADER, size - 8):
                raise MossError(f"{path}: not a safetensors file, or cut short inside its header ({size} bytes)")
            text = file.read(length)
    except FileNotFoundError:
        raise MossError(f"{path}: no such file") from None
    except OSError as error:
        raise MossError(f"{path}: cannot be read ({error.strerror})") from error
    except MossError:
        raise
    except ValueError as error:  # such as a null byte in the name
        raise MossError(f"{path}: is not a name that a file can have ({error})") from error
    with located(f"{path}: its safetensors header"):
        header = parse_object(text)
    metadata = _string_map(header.pop("__metadata__", {}), f"{path}: __metadata__ in its safetensors header")
    spans = {name: _info(path, 8 + length, name, entry) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(spans.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise MossError(f"{path}: damaged header, tensor {shown(name)} {what}")
        end = info.start + info.nbytes
    if end != size:
        what = "cut short" if size < end else "longer than its header says"
        raise MossError(f"{path}: {what}, it has {size} bytes and its header describes {end}")
    return metadata, spans


class FileWriter:
    """Writes one safetensors file, one tensor at a time, in any order.

    Names, shapes and dtypes are given in advance, and with them the place of every tensor. The file is written in
    place: use it inside `atomic_file` or `atomic_folder`. On exit the context manager checks that all tensors were
    written.

    Args:
        path: the file.
        tensors: {name: anything with .shape and .dtype}.
        metadata: strings for the header.

    Attributes:
        missing: names of the tensors that have not been written.

    Raises:
        MossError: safetensors does not have the dtype of a tensor.
    """

    def __init__(self, path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None):
        path = Path(path)
        specs = _specs(tensors)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        # With the widest dtype first every tensor is aligned; the safetensors library does the same.
        for name in sorted(specs, key=lambda key: (-specs[key][1].itemsize, key)):
            shape, dtype = specs[name]
            if dtype not in NAMES:
                raise MossError(f"{path}: tensor {name!r} has dtype {dtype}, which safetensors does not know")
            end = offset + _nbytes(specs[name])
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._tensors = {
            name: TensorInfo(path, *spec, self._base + header[name]["data_offsets"][0]) for name, spec in specs.items()
        }
        self.missing = set(specs)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._base + offset)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes one tensor, of the shape and dtype that was given in advance."""
        info = self._tensors[name]
        tensor = np.asarray(tensor)
        if tensor.shape != info.shape or tensor.dtype != info.dtype:
            expected = f"{list(info.shape)} {info.dtype}"
            raise ValueError(f"tensor {name!r} is {list(tensor.shape)} {tensor.dtype}, expected {expected}")
        self._file.seek(info.start)
        if tensor.nbytes:
            self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        self.missing.discard(name)

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self.missing:
            raise ValueError(f"tensors that were not written: {', '.join(sorted(self.missing))}")


class TensorWriter:
    """A `FileWriter` for checkpoints of any size: above `shard_bytes` it writes shards and an index.

    With the stem "model" it writes `model.safetensors`, or `model-00001-of-00004.safetensors` ... and
    `model.safetensors.index.json`, into the existing `folder`. A single tensor is never split.
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Mapping[str, Any],
        stem: str = "model",
        metadata: Mapping[str, str] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ):
        folder = Path(folder)
        specs = _specs(tensors)
        shards = _shards(specs, shard_bytes)
        files = [f"{stem}.safetensors"]
        if len(shards) > 1:
            files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            weight_map = {key: name for name, shard in zip(files, shards, strict=True) for key in shard}
            total = sum(map(_nbytes, specs.values()))
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        self._writers = [
            FileWriter(folder / name, {key: tensors[key] for key in shard}, metadata)
            for name, shard in zip(files, shards, strict=True)
        ]
        self._writer_of = {key: writer for writer, shard in zip(self._writers, shards, strict=True) for key in shard}

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes one tensor, of the shape and dtype that was given in advance."""
        self._writer_of[name].write(name, tensor)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.__exit__(kind, error, trace)


def _specs(tensors: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (tuple(tensor.shape), np.dtype(tensor.dtype)) for name, tensor in tensors.items()}


def _nbytes(spec: tuple[tuple[int, ...], np.dtype]) -> int:
    return math.prod(spec[0]) * spec[1].itemsize


def _shards(specs: Mapping[str, tuple[tuple[int, ...], np.dtype]], limit: int) -> list[list[str]]:
    """The names of the tensors of each shard: consecutive ones, as many as stay below `limit` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + _nbytes(spec) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(spec)
    return shards


def _find(folder: Path) -> Path:
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if is_file(folder / name):
            return folder / name
    found = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        state = "no safetensors file" if not found else f"{len(found)} safetensors files without an index"
        raise MossError(f"{folder}: {state}, expected model.safetensors or model.safetensors.index.json")
    return found[0]


def _open_index(path: Path) -> TensorReader:
    index = read_json(path)
    weight_map = _string_map(index.get("weight_map"), f"{path}: its weight_map, which maps tensor names to file names,")
    metadata = index.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise MossError(f"{path}: its metadata is {shown(metadata)}, expected an object")
    files = sorted(set(weight_map.values()))
    if outside := [short(name) for name in files if Path(name).name != name]:
        raise MossError(f"{path}: names files outside its folder: {', '.join(outside)}")
    if missing := [short(name) for name in files if not is_file(path.parent / name)]:
        raise MossError(f"{path.parent}: {_count(missing, 'shard')} missing: {', '.join(missing)}")
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        for key, info in read_header(path.parent / name)[1].items():
            if weight_map.get(key) != name:
                where = f"in {short(weight_map[key])}" if key in weight_map else "nowhere"
                raise MossError(f"{path.parent / name}: holds {shown(key)}, which the index {path.name} puts {where}")
            tensors[key] = info
    if lost := [f"{key} ({file})" for key, file in weight_map.items() if key not in tensors]:
        raise MossError("\n  ".join([f"{path}: {_count(lost, 'tensor')} not in the shard that it names", *lost]))
    return TensorReader(path, {key: tensors[key] for key in weight_map}, metadata)


def _info(path: Path, base: int, name: str, entry: Any) -> TensorInfo:
    """Checks one entry of a header; the bytes of the tensors begin at byte `base` of the file."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or not _is_shape(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise MossError(f"{path}: damaged header, {shown(name)} has no proper dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise MossError(f"{path}: tensor {shown(name)} has dtype {shown(dtype)}, known are {', '.join(DTYPES)}")
    start, end = offsets
    info = TensorInfo(path, tuple(shape), DTYPES[dtype], base + start)
    if info.nbytes != end - start:
        needs = f"{shown(shape)} {dtype} needs {shown(info.nbytes)} bytes, has {end - start}"
        raise MossError(f"{path}: damaged header, tensor {shown(name)} {needs}")
    return info


def _is_shape(value: Any) -> bool:
    """Whether this is a list of whole numbers that numpy accepts as a shape."""
    return _is_sizes(value) and len(value) <= MAX_RANK and math.prod(n for n in value if n) < MAX_ELEMENTS


def _is_sizes(value: Any) -> bool:
    """Whether this is a list of whole numbers, none negative."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _string_map(value: Any, what: str) -> dict[str, str]:
    """`value` if it is an object of strings; `what` names it in the error."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise MossError(f"{what} is not an object of strings")
    return value


def _count(items: Iterable[Any], noun: str) -> str:
    count = len(list(items))
    return f"{count} {noun}{'s are' if count > 1 else ' is'}"

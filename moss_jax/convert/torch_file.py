"""Reads and writes PyTorch's .pt files, for conversion only: nothing is unpickled at run time."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moss_jax.convert.stream import MemoryTensors, TensorSource
from moss_jax.documents import short, shown
from moss_jax.errors import MossError
from moss_jax.files import atomic_file, is_file

# Dtypes that a checkpoint of a released model may have; float8 and quantized ones are not among them.
PLAIN_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def import_torch() -> Any:
    """The torch module. Raises MossError if it is not installed."""
    try:
        import torch
    except ImportError:
        raise MossError(
            "PyTorch is not installed, but .pt files need it: pip install 'moss-jax[convert]' (only for converting)"
        ) from None
    return torch


def read_torch(path: str | Path) -> tuple[MemoryTensors, dict[str, Any]]:
    """The tensors of a state dictionary, and its numbers (`epoch` and `step`).

    The file is loaded with `weights_only=True`, which refuses files that contain code.

    Raises:
        MossError: the file is missing, damaged, contains code, or is not a dictionary of plain tensors and numbers.
    """
    torch = import_torch()
    path = Path(path)
    if not is_file(path):
        raise MossError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and others
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MossError(f"{path}: not a readable PyTorch file of plain tensors ({reason[:200]})") from error
    if not isinstance(state, Mapping):
        raise MossError(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors")
    tensors: dict[str, np.ndarray] = {}
    extras: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in state.items():
        if not isinstance(name, str):
            problems.append(f"unmapped: the name {shown(name)} is not a string")
        elif isinstance(value, torch.Tensor):
            if problem := _tensor_problem(torch, value):
                problems.append(f"unmapped: {short(name)} is {problem}")
            else:
                tensors[name] = _to_numpy(torch, value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            extras[name] = value
        else:
            problems.append(f"unmapped: {short(name)} is a {type(value).__name__}")
    if problems:
        raise MossError("\n  ".join([f"{path}: entries that are neither plain tensors nor numbers", *problems]))
    return MemoryTensors(path, tensors), extras


def write_torch(path: str | Path, source: TensorSource, extras: Mapping[str, Any]) -> None:
    """Writes a state dictionary of the tensors and `extras`, completely or not at all."""
    torch = import_torch()
    state = {name: _to_torch(torch, source.read(name)) for name in source.tensors}
    with atomic_file(path) as part:
        torch.save(state | dict(extras), part)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"  # the format before torch 1.6 cannot be memory-mapped


def _tensor_problem(torch: Any, tensor: Any) -> str | None:
    """Why a tensor cannot be read as plain values, or None. Nothing is computed or copied."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"a tensor of layout {tensor.layout}, expected a dense one"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device}, without values"
    if str(tensor.dtype).removeprefix("torch.") not in PLAIN_DTYPES:
        return f"of {tensor.dtype}, expected one of {', '.join(PLAIN_DTYPES)}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{list(tensor.shape)} with fewer values stored than that"
    return None


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    array = np.array(array, order="C")  # torch needs writable memory
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

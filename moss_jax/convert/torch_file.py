"""PyTorch's .pt files, in and out. Only converters touch them: at run time nothing is unpickled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moss_jax.checkpoint import atomic_file
from moss_jax.convert.stream import MemoryTensors, Source
from moss_jax.errors import MossError


def import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MossError(
            "PyTorch is not installed, and .pt files need it: pip install 'moss-jax[convert]' (only for converting)"
        ) from None
    return torch


def read_torch(path: str | Path) -> tuple[MemoryTensors, dict[str, Any]]:
    """The tensors of a state dictionary, and what else it holds (`epoch` and `step`, whole numbers).

    Loads with `weights_only=True`: a file that asks for code is refused.

    Raises:
        MossError: missing, damaged, not a dictionary, code in it, or entries that are neither tensors nor numbers.
    """
    torch, path = import_torch(), Path(path)
    if not path.is_file():
        raise MossError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and others
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MossError(f"{path}: not a readable PyTorch file of plain tensors ({reason[:200]})") from error
    if not isinstance(state, Mapping):
        raise MossError(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors")
    tensors, extras, other = {}, {}, []
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[str(name)] = _to_numpy(torch, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            extras[str(name)] = value
        else:
            other.append(f"unmapped: {name} is a {type(value).__name__}")
    if other:
        raise MossError("\n  ".join([f"{path}: entries that are neither tensors nor numbers", *other]))
    return MemoryTensors(path, tensors), extras


def write_torch(path: str | Path, source: Source, extras: Mapping[str, Any]) -> None:
    """Writes a state dictionary with `extras` beside its tensors, whole or not at all."""
    torch = import_torch()
    state = {name: _to_torch(torch, source.read(name)) for name in source.tensors}
    with atomic_file(path) as part:
        torch.save(state | dict(extras), part)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"  # the older format cannot be mapped


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    array = np.array(array, order="C")  # torch wants writable memory of its own
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

"""Files of this package: safetensors, parameter trees, config files, components and system folders."""

from moss_jax.checkpoint.safetensors import TensorReader, TensorWriter, open_tensors
from moss_jax.checkpoint.store import check_shapes, load_tree, save_tensors, save_tree

__all__ = [
    "TensorReader",
    "TensorWriter",
    "check_shapes",
    "load_tree",
    "open_tensors",
    "save_tensors",
    "save_tree",
]

"""Files of this package: safetensors, parameter trees, config files, components and system folders."""

from moss_jax.checkpoint.safetensors import TensorReader, TensorWriter, open_tensors
from moss_jax.checkpoint.store import check_shapes, load_tree, save_tensors, save_tree
from moss_jax.files import atomic_file, atomic_folder, write_text

__all__ = [
    "TensorReader",
    "TensorWriter",
    "atomic_file",
    "atomic_folder",
    "check_shapes",
    "load_tree",
    "open_tensors",
    "save_tensors",
    "save_tree",
    "write_text",
]

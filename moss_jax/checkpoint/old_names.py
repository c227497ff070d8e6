"""Parameter paths of earlier versions, under which files and checkpoints of that time still load.

Up to version 0.1.0 the projections of the attention layers of the speech tokenizer and of the flow were called query,
key, value and out. They are q, k, v and o now, as those of the language model always were.
"""

from collections.abc import Collection, Mapping
from typing import Any

from moss_jax.checkpoint.safetensors import TensorReader

OLD_MODULES = {"q": "query", "k": "key", "v": "value", "o": "out"}
CROSS = "cross_"  # in front of a projection of cross-attention


def old_path(path: str) -> str:
    """The path that a parameter `.../q/kernel` had before; any other path is returned unchanged."""
    *above, module, leaf = f"/{path}".split("/")
    name = module.removeprefix(CROSS)
    if name not in OLD_MODULES:
        return path
    module = module.removesuffix(name) + OLD_MODULES[name]
    return "/".join([*above, module, leaf]).removeprefix("/")


def renamed_paths(expected: Collection[str], found: Collection[str]) -> dict[str, str]:
    """{path: its old path} of the expected parameters that are found under the old path only."""
    pairs = {path: old_path(path) for path in expected}
    return {path: old for path, old in pairs.items() if path not in found and old in found}


def with_current_names(reader: TensorReader, expected: Collection[str]) -> TensorReader:
    """A reader that offers the expected parameters under their current paths, whichever ones the file has."""
    renamed = renamed_paths(expected, reader.tensors)
    if not renamed:
        return reader
    current = {old: path for path, old in renamed.items()}
    tensors = {current.get(name, name): info for name, info in reader.tensors.items()}
    return TensorReader(reader.path, tensors, reader.metadata)


def with_keys(tree: Any, keys: Mapping[str, str]) -> Any:
    """The tree with every dictionary key that is in `keys` replaced, at any depth of dictionaries, lists and tuples."""
    if isinstance(tree, Mapping):
        return {keys.get(key, key): with_keys(value, keys) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a named tuple, as optax's states are
        return type(tree)(*(with_keys(value, keys) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(with_keys(value, keys) for value in tree)
    return tree

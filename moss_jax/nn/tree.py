"""Parameter trees: flat {'a/b/c': leaf} <-> nested dictionaries, and their shapes without allocating anything."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries -> {'a/b/c': leaf}."""
    flat: dict[str, Any] = flatten_dict(tree, sep="/")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b/c': leaf} -> nested dictionaries."""
    tree: dict[str, Any] = unflatten_dict(flat, sep="/")
    return tree


def param_shapes(module: nn.Module, *inputs: Any, **keywords: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat {path: ShapeDtypeStruct} of a module's parameters for inputs of these shapes; nothing is allocated."""
    variables = jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args, **keywords), *inputs)
    return flatten(nn.unbox(variables)["params"])


def param_axes(module: nn.Module, *inputs: Any, **keywords: Any) -> dict[str, tuple[str | None, ...]]:
    """Flat {path: logical axis names, one for each dimension} of a module's parameters; nothing is allocated."""
    variables = jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args, **keywords), *inputs)
    boxes = jax.tree.leaves_with_path(variables["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    return {"/".join(key.key for key in path): box.names for path, box in boxes}

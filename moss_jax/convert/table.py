"""Name tables: which tensor of a released checkpoint is which parameter of ours, and how its layout changes.

A row has a tensor name of the released file and a '/'-joined path in our parameter tree. Both may contain placeholders
such as `{layer}`. A placeholder in both is a name component that is copied. A placeholder in the name only is a stacked
axis: the tensors are stacked along leading axes of our array, in the order of the placeholders in the name. For example

    Row("model.text_block.layers.{layer}.mlp.up_proj.weight", "text/layers/mlp/up/kernel", LINEAR)

maps four tensors [F, D] to one array [L=4, D, F], and back.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import numpy as np
from einops import rearrange

from moss_jax.errors import MossError

PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Transform:
    """A change of layout without arithmetic, as the einops patterns of the released and of our layout.

    `to_theirs(to_ours(x))` is `x`, bit for bit. Both directions can be traced by JAX for their shapes alone.
    """

    theirs: str
    ours: str
    heads: int | None = None  # size of the axis "heads"

    def to_ours(self, x: Any) -> Any:
        return rearrange(x, f"{self.theirs} -> {self.ours}", **self._sizes())

    def to_theirs(self, x: Any) -> Any:
        return rearrange(x, f"{self.ours} -> {self.theirs}", **self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {} if self.heads is None else {"heads": self.heads}


SAME = Transform("...", "...")
LINEAR = Transform("outputs inputs", "inputs outputs")
CONV1D = Transform("outputs inputs width", "width inputs outputs")
CONV2D = Transform("outputs inputs height width", "height width inputs outputs")
CONV_TRANSPOSE1D = Transform("inputs outputs width", "width inputs outputs")  # the kernel is not flipped
CONV1X1 = Transform("outputs inputs 1", "inputs outputs")


def heads_out(heads: int) -> Transform:
    """Query, key and value projections: [heads * head_dim, embed] -> [embed, heads, head_dim]."""
    return Transform("(heads head_dim) embed", "embed heads head_dim", heads)


def heads_bias(heads: int) -> Transform:
    """Biases of query, key and value projections: [heads * head_dim] -> [heads, head_dim]."""
    return Transform("(heads head_dim)", "heads head_dim", heads)


def heads_in(heads: int) -> Transform:
    """Output projections: [embed, heads * head_dim] -> [heads, head_dim, embed]."""
    return Transform("embed (heads head_dim)", "heads head_dim embed", heads)


@dataclass(frozen=True)
class Row:
    """A tensor name, the path of our parameter, and the change of layout between them."""

    name: str
    path: str
    transform: Transform = SAME


@dataclass(frozen=True)
class TableEntry:
    """A parameter of ours and the released tensors it consists of.

    Attributes:
        path, shape, dtype: of our parameter.
        names: the tensor names, an object array; its shape is that of the stacked leading axes of `shape`.
        source_shape: shape of each of the tensors.
        transform: between one tensor and its part of the parameter.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    names: np.ndarray
    source_shape: tuple[int, ...]
    transform: Transform

    def to_ours(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """A new array [*shape] with the dtype of the tensors, which are read one at a time."""
        if self.names.ndim == 0:
            return np.ascontiguousarray(self.transform.to_ours(read(self.names.item())))
        stacked: np.ndarray | None = None
        for index in np.ndindex(self.names.shape):
            part = self.transform.to_ours(read(str(self.names[index])))
            if stacked is None:
                stacked = np.empty(self.shape, part.dtype)
            stacked[index] = part
        assert stacked is not None, f"{self.path} is a stack of no tensors"
        return stacked

    def to_theirs(self, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor) for every released tensor that is part of `value`."""
        for index in np.ndindex(self.names.shape):
            yield str(self.names[index]), np.ascontiguousarray(self.transform.to_theirs(value[index]))


@dataclass(frozen=True)
class NameTable:
    """The rows of a released checkpoint.

    Attributes:
        rows: see `Row`.
        carried: regular expressions of the names of tensors that the model does not use and an export restores.
    """

    rows: tuple[Row, ...]
    carried: tuple[str, ...] = ()

    def entries(self, tree: Mapping[str, Any]) -> list[TableEntry]:
        """One entry for each leaf of `tree`, a flat {path: array or ShapeDtypeStruct} of our parameters.

        Raises:
            LookupError: not exactly one row matches a leaf. That is an error in the table, not in a checkpoint.
        """
        patterns = [(_pattern(row.path), row) for row in self.rows]
        entries = []
        for path, leaf in tree.items():
            matches = [(match, row) for pattern, row in patterns if (match := pattern.fullmatch(path))]
            if len(matches) != 1:
                raise LookupError(f"{len(matches)} rows of the name table match the parameter {path!r}, expected one")
            match, row = matches[0]
            entries.append(_entry(path, leaf, row, match.groupdict()))
        return entries

    def shapes(self, tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the released tensors that the parameters in `tree` consist of."""
        return {str(name): entry.source_shape for entry in self.entries(tree) for name in entry.names.flat}

    def is_carried(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.carried)

    def check(self, shapes: Mapping[str, tuple[int, ...]], tree: Mapping[str, Any], where: str) -> None:
        """Compares the tensors of a file, {name: shape}, with those that `tree` needs.

        Raises:
            MossError: the full list of unmapped, missing and misshapen tensors, after `where`.
        """
        expected = self.shapes(tree)
        problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in shapes]
        for name, shape in shapes.items():
            if name not in expected:
                if not self.is_carried(name):
                    problems.append(f"unmapped: {name} {list(shape)}")
            elif tuple(shape) != expected[name]:
                problems.append(f"misshapen: {name} is {list(shape)}, expected {list(expected[name])}")
        if problems:
            count = f"{len(problems)} tensor{'s do' if len(problems) > 1 else ' does'}"
            raise MossError(
                "\n  ".join([f"{where}: {count} not fit the model its config describes", *sorted(problems)])
            )

    def to_ours(self, tensors: Mapping[str, np.ndarray], tree: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
        """All parameters of a small checkpoint as a flat tree, after `check`; `import_tensors` does large ones."""
        self.check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tree, where)
        return {entry.path: entry.to_ours(tensors.__getitem__) for entry in self.entries(tree)}

    def to_theirs(self, tree: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor) in the released layout for a flat tree of our parameters."""
        for entry in self.entries(tree):
            yield from entry.to_theirs(np.asarray(tree[entry.path]))


def prefixed(rows: Iterable[Row], name: str = "", path: str = "") -> tuple[Row, ...]:
    """The rows with a prefix added to every name and every path."""
    return tuple(Row(name + row.name, path + row.path, row.transform) for row in rows)


def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression for a path, with the placeholders as named groups."""
    parts = PLACEHOLDER.split(template)
    return re.compile("".join(re.escape(p) if i % 2 == 0 else f"(?P<{p}>\\w+)" for i, p in enumerate(parts)))


def _entry(path: str, leaf: Any, row: Row, bound: dict[str, str]) -> TableEntry:
    stacked = [name for name in PLACEHOLDER.findall(row.name) if name not in bound]
    sizes = tuple(leaf.shape[: len(stacked)])
    names = np.empty(sizes, object)
    for index in product(*map(range, sizes)):
        names[index] = row.name.format(**bound, **dict(zip(stacked, index, strict=True)))
    inner = jax.ShapeDtypeStruct(leaf.shape[len(stacked) :], leaf.dtype)
    source_shape = jax.eval_shape(row.transform.to_theirs, inner).shape
    return TableEntry(path, tuple(leaf.shape), leaf.dtype, names, source_shape, row.transform)

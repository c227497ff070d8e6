"""Name tables: one row says where a foreign tensor lives in our tree and how its layout changes, in both directions.

A row's `name` is a tensor name of the released file, its `path` a '/'-joined path in our parameter tree. Both may hold
placeholders such as `{layer}`. A placeholder that stands in both is substituted; one that stands in the name only is a
stacked axis: the tensors are stacked along leading axes of our array, in the order in which the placeholders stand in
the name. So

    Row("model.text_block.layers.{layer}.mlp.up_proj.weight", "text/layers/mlp/up/kernel", LINEAR)

maps four `[mlp, embed]` tensors to one `[layers=4, embed, mlp]` array, and back.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import jax
import numpy as np

from moss_jax.errors import MossError

PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Transform:
    """A change of layout without arithmetic. `to_theirs(to_ours(x))` is `x`, bit for bit.

    Both directions use only `.reshape` and `.transpose`, so that shapes can be traced without data.
    """

    to_ours: Callable[[Any], Any]
    to_theirs: Callable[[Any], Any]


def _permute(*axes: int) -> Transform:
    inverse = tuple(int(i) for i in np.argsort(axes))
    return Transform(lambda x: x.transpose(axes), lambda x: x.transpose(inverse))


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = _permute(1, 0)  # torch [out, in] -> [in, out]
CONV1D = _permute(2, 1, 0)  # torch [out, in, width] -> [width, in, out]
CONV2D = _permute(2, 3, 1, 0)  # torch [out, in, height, width] -> [height, width, in, out]
CONV_TRANSPOSE1D = _permute(2, 0, 1)  # torch [in, out, width] -> [width, in, out], not flipped
CONV1X1 = Transform(
    lambda x: x.reshape(x.shape[:2]).transpose(1, 0), lambda x: x.transpose(1, 0).reshape(*x.shape[::-1], 1)
)


def heads_out(heads: int) -> Transform:
    """torch [heads * head_dim, embed] -> [embed, heads, head_dim] (q, k and v projections)."""
    return Transform(
        lambda x: x.transpose(1, 0).reshape(x.shape[1], heads, x.shape[0] // heads),
        lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2]).transpose(1, 0),
    )


def heads_bias(heads: int) -> Transform:
    """torch [heads * head_dim] -> [heads, head_dim]."""
    return Transform(lambda x: x.reshape(heads, x.shape[0] // heads), lambda x: x.reshape(x.shape[0] * x.shape[1]))


def heads_in(heads: int) -> Transform:
    """torch [embed, heads * head_dim] -> [heads, head_dim, embed] (output projection)."""
    return Transform(
        lambda x: x.transpose(1, 0).reshape(heads, x.shape[1] // heads, x.shape[0]),
        lambda x: x.reshape(x.shape[0] * x.shape[1], x.shape[2]).transpose(1, 0),
    )


@dataclass(frozen=True)
class Row:
    name: str
    path: str
    transform: Transform = SAME


@dataclass(frozen=True)
class TableEntry:
    """One parameter of ours with every foreign tensor that it is made of.

    `names` is an object array whose shape is the stacked leading part of `shape`; `source_shape` is the foreign shape
    of each of them.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    names: np.ndarray
    source_shape: tuple[int, ...]
    transform: Transform

    def to_ours(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Reads the tensors one by one into one new array of `shape`; dtype is that of the tensors."""
        if self.names.ndim == 0:
            return np.ascontiguousarray(self.transform.to_ours(read(self.names.item())))
        out = None
        for index in np.ndindex(self.names.shape):
            part = self.transform.to_ours(read(self.names[index]))
            if out is None:
                out = np.empty(self.shape, part.dtype)
            out[index] = part
        return out

    def to_theirs(self, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor) for each foreign tensor inside `value`."""
        for index in np.ndindex(self.names.shape):
            yield str(self.names[index]), np.ascontiguousarray(self.transform.to_theirs(value[index]))


@dataclass(frozen=True)
class NameTable:
    """The rows of one released checkpoint, and regular expressions of the names that are carried along unused."""

    rows: tuple[Row, ...]
    carried: tuple[str, ...] = field(default=())

    def entries(self, tree: Mapping[str, Any]) -> list[TableEntry]:
        """One entry for each leaf of `tree`, a flat {path: array or ShapeDtypeStruct} of our parameters.

        Raises LookupError when a leaf has no row: a fault of the table, not of a checkpoint.
        """
        patterns = [(_pattern(row.path), row) for row in self.rows]
        entries = []
        for path, leaf in tree.items():
            found = [(match, row) for pattern, row in patterns if (match := pattern.fullmatch(path))]
            if len(found) != 1:
                raise LookupError(f"{len(found)} rows of the name table fit the parameter {path!r}, expected one")
            match, row = found[0]
            entries.append(_entry(path, leaf, row, match.groupdict()))
        return entries

    def shapes(self, tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """{foreign name: foreign shape} of everything that `tree` is made of."""
        return {str(name): entry.source_shape for entry in self.entries(tree) for name in entry.names.flat}

    def is_carried(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.carried)

    def check(self, found: Mapping[str, tuple[int, ...]], tree: Mapping[str, Any], where: str) -> None:
        """Raises MossError with the full list of unmapped, missing and misshapen tensors in `found` {name: shape}."""
        expected = self.shapes(tree)
        problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
        for name, shape in found.items():
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
        """The whole of a small checkpoint as a flat tree of ours, after `check`. Large ones stream entry by entry."""
        self.check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tree, where)
        return {entry.path: entry.to_ours(tensors.__getitem__) for entry in self.entries(tree)}

    def to_theirs(self, tree: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor) in the released layout for a flat tree of ours."""
        for entry in self.entries(tree):
            yield from entry.to_theirs(np.asarray(tree[entry.path]))


def prefixed(rows: Iterable[Row], name: str = "", path: str = "") -> tuple[Row, ...]:
    """The same rows with a prefix before every name and every path."""
    return tuple(Row(name + row.name, path + row.path, row.transform) for row in rows)


def _pattern(template: str) -> re.Pattern:
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

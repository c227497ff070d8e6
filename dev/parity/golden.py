"""Reading a golden file: one safetensors file with weights, inputs, outputs and the rules for comparing them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.convert.table import NameTable
from moss_jax.documents import parse_json
from moss_jax.errors import MossError

FORMAT = "golden-1"


class Mismatch(Exception):
    """The file is readable but does not have what its component needs. This is a failed check."""


class Config(dict):
    """A JSON object of the metadata; access to a missing key raises Mismatch."""

    def __missing__(self, key: str):
        raise Mismatch(f"config has no {key!r}, only {', '.join(sorted(self)) or 'nothing'}")


def _config(value: Any) -> Any:
    if isinstance(value, dict):
        return Config({key: _config(inner) for key, inner in value.items()})
    return [_config(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Golden:
    """The content of one golden file.

    Attributes:
        component: which part of the system to run, such as `lm.split` or `codec.flow`.
        config: sizes and special ids, under the reference's own keys.
        final: {output name: (atol, rtol)} of what must be compared.
        contract: rules for the comparison.
        meta: all metadata as stored (strings; JSON is not decoded).
        weights, inputs, outputs, new: {name without its 'weight/', 'input/', 'output/', 'new/' prefix: array}; `new`
            has the tensors that a conversion would create at random.
    """

    path: Path
    component: str
    config: dict[str, Any]
    final: dict[str, tuple[float, float]]
    contract: dict[str, Any]
    meta: dict[str, str]
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    new: dict[str, np.ndarray]

    def need(self, name: str) -> np.ndarray:
        """The input `name`. A missing input raises Mismatch; in particular, noise is never drawn instead."""
        if name not in self.inputs:
            raise Mismatch(f"input/{name} is missing")
        return self.inputs[name]

    def compared(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The mask [B, T, 1...] of an output [B, T, ...]: the `rows` [B, T] that must be compared, and others that are
        not zero in the file: the reference computed them as well."""
        stored = self.outputs.get(name)
        rows = rows.astype(bool)
        if stored is None or stored.shape[:2] != rows.shape:
            return rows  # the comparison reports the shapes
        axes = tuple(range(2, stored.ndim))
        return (rows | (stored != 0).any(axes)).reshape(*rows.shape, *[1] * len(axes))

    def params(
        self, table: NameTable, tree: Mapping[str, Any], prefix: str = "", strip: str = ""
    ) -> dict[str, np.ndarray]:
        """The weights as our flat parameters, mapped by the name table of the released checkpoint.

        Args:
            table: the released checkpoint's name table.
            tree: flat {path: ShapeDtypeStruct} of the parameters that the component has.
            prefix: what the released file and the table have in front of the golden's names.
            strip: take only the weights with this prefix, and remove it. The caller checks the others.
        """
        weights = {prefix + k[len(strip) :]: v for k, v in self.weights.items() if k.startswith(strip)}
        try:
            return table.to_ours(weights, tree, "weights")
        except MossError as error:
            raise Mismatch(str(error)) from error


def read_golden(path: str | Path) -> Golden:
    """Reads a golden file.

    Raises:
        MossError: the file is missing, truncated, not safetensors, or not of this format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise MossError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise MossError(f"{path}: not a readable safetensors file ({error})") from error
    if meta.get("format") != FORMAT:
        raise MossError(f"{path}: metadata 'format' is {meta.get('format')!r}, expected {FORMAT!r}")
    try:
        decoded = {key: _config(parse_json(meta.get(key, "{}"))) for key in ("config", "final", "contract")}
        final = {name: (float(atol), float(rtol)) for name, (atol, rtol) in decoded["final"].items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise MossError(
            f"{path}: metadata 'config', 'final' or 'contract' is not the expected JSON ({error})"
        ) from error
    kinds: dict[str, dict[str, np.ndarray]] = {"weight": {}, "input": {}, "output": {}, "new": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind not in kinds or not rest:
            raise MossError(f"{path}: tensor {name!r} is neither weight/*, input/*, output/* nor new/*")
        kinds[kind][rest] = tensor
    return Golden(
        path,
        meta.get("component", ""),
        decoded["config"],
        final,
        decoded["contract"],
        meta,
        kinds["weight"],
        kinds["input"],
        kinds["output"],
        kinds["new"],
    )

"""Name tables: layouts and stacking round-trip, and all problems are reported at once."""

import numpy as np
import pytest

from moss_jax.convert.table import (
    CONV1D,
    CONV1X1,
    CONV2D,
    CONV_TRANSPOSE1D,
    LINEAR,
    SAME,
    NameTable,
    Row,
    heads_bias,
    heads_in,
    heads_out,
)
from moss_jax.errors import MossError

TABLE = NameTable(
    (
        Row("layers.{layer}.up.weight", "layers/up/kernel", LINEAR),
        Row("layers.{layer}.q.weight", "layers/q/kernel", heads_out(4)),
        Row("stages.{stage}.{block}.{norm}.weight", "stages/{norm}/scale"),
        Row("head.weight", "head/kernel", LINEAR),
    ),
    carried=(r"extra\..*",),
)


def foreign():
    rng = np.random.default_rng(0)
    tensors = {f"layers.{i}.up.weight": rng.normal(size=(5, 3)) for i in range(3)}
    tensors |= {f"layers.{i}.q.weight": rng.normal(size=(8, 3)) for i in range(3)}
    tensors |= {f"stages.{s}.{b}.{n}.weight": rng.normal(size=7) for s in range(2) for b in range(4) for n in "ab"}
    return tensors | {"head.weight": rng.normal(size=(6, 3))}


def tree():
    shapes = {
        "layers/up/kernel": (3, 3, 5),
        "layers/q/kernel": (3, 3, 4, 2),
        "stages/a/scale": (2, 4, 7),
        "stages/b/scale": (2, 4, 7),
        "head/kernel": (3, 6),
    }
    return {path: np.zeros(shape) for path, shape in shapes.items()}


def test_round_trip_is_bit_identical():
    ours = TABLE.to_ours(foreign(), tree(), "file")
    assert {path: value.shape for path, value in ours.items()} == {path: leaf.shape for path, leaf in tree().items()}
    back = dict(TABLE.to_theirs(ours))
    assert back.keys() == foreign().keys()
    for name, tensor in foreign().items():
        assert back[name].tobytes() == tensor.tobytes(), name


def test_a_stacked_axis_follows_the_order_of_the_placeholders():
    ours = TABLE.to_ours(foreign(), tree(), "file")
    np.testing.assert_array_equal(ours["stages/b/scale"][1, 2], foreign()["stages.1.2.b.weight"])


TRANSFORMS = [
    (SAME, (4,), (4,)),
    (LINEAR, (4, 6), (6, 4)),
    (CONV1D, (4, 6, 3), (3, 6, 4)),
    (CONV1X1, (4, 6, 1), (6, 4)),
    (CONV2D, (4, 6, 3, 5), (3, 5, 6, 4)),
    (CONV_TRANSPOSE1D, (4, 6, 3), (3, 4, 6)),
    (heads_out(2), (4, 6), (6, 2, 2)),
    (heads_in(3), (4, 6), (3, 2, 4)),
    (heads_bias(2), (4,), (2, 2)),
]


@pytest.mark.parametrize(("transform", "theirs", "ours"), TRANSFORMS)
def test_every_transform_inverts(transform, theirs, ours):
    x = np.random.default_rng(1).normal(size=theirs)
    assert transform.to_ours(x).shape == ours
    np.testing.assert_array_equal(transform.to_theirs(transform.to_ours(x)), x)


def test_all_problems_are_listed_at_once():
    tensors = foreign()
    del tensors["layers.1.up.weight"]
    tensors["head.weight"] = np.zeros((3, 6))
    tensors["layers.0.gate.weight"] = np.zeros(2)
    tensors["extra.count"] = np.zeros(1)
    with pytest.raises(MossError) as error:
        TABLE.to_ours(tensors, tree(), "model.safetensors")
    text = str(error.value)
    assert text.splitlines()[0] == "model.safetensors: 3 tensors do not fit the model its config describes"
    for line in ("missing: layers.1.up.weight [5, 3]", "unmapped: layers.0.gate.weight [2]"):
        assert line in text
    assert "misshapen: head.weight is [3, 6], expected [6, 3]" in text
    assert "extra.count" not in text


def test_a_parameter_without_a_row_is_a_lookup_error():
    with pytest.raises(LookupError, match="nowhere"):
        TABLE.entries({"nowhere/kernel": np.zeros(2)})

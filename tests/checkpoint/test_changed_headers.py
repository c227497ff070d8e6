"""A changed safetensors header is read or refused, without a crash."""

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.checkpoint import open_tensors, save_tensors
from moss_jax.errors import MossError

SCALARS = st.sampled_from([None, True, -1, 0, 1, 2, 24, 2**31, 2**63, 2**64, 1.5, "", "F32", "F64", "x" * 300, "a\0"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


def places(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(data, value):
    """A copy of a JSON object in which one value, at any depth, is changed."""
    copy = json.loads(json.dumps(value))
    *above, last = data.draw(st.sampled_from([place for place in places(copy) if place]))
    inner = copy
    for key in above:
        inner = inner[key]
    inner[last] = data.draw(VALUES)
    return copy


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_a_changed_header(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    save_tensors(path, {name: np.ones((2, 3), np.float32) for name in "ab"}, {"format": "x"})
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(changed(data, json.loads(raw[8:end]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    try:
        reader = open_tensors(path)
        for name in reader.tensors:
            reader.read(name)
    except MossError as error:
        assert "changed.safetensors" in str(error).splitlines()[0]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(data=st.data())
def test_a_changed_index(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "one.safetensors", {"a": np.ones(3, np.float32)})
    index = {"metadata": {"total_size": 12}, "weight_map": {"a": "one.safetensors"}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(changed(data, index)))
    try:
        reader = open_tensors(path)
        for name in reader.tensors:
            assert reader.read(name).shape == (3,)
    except MossError as error:
        assert str(folder) in str(error).splitlines()[0]

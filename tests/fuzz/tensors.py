"""Damaged safetensors files, headers and indexes of shards: `open_tensors` and a read of every tensor."""

import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from moss_jax.checkpoint import open_tensors
from tests.fuzz.documents import CHANGES, SCALARS, changed, json_text
from tests.fuzz.edits import edited, edits

HEADER = {
    "__metadata__": {"format": "moss-jax-1"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b/kernel": {"dtype": "I64", "shape": [2], "data_offsets": [24, 40]},
    "c": {"dtype": "BF16", "shape": [], "data_offsets": [40, 42]},
    "d": {"dtype": "U8", "shape": [0, 4], "data_offsets": [42, 42]},
}
BYTES = bytes(range(42))
FIELDS = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.sampled_from(["F32", "F8_E4M3", "BOOL", "F4", ["F32"], [0, 2**63], [2**32, 2**32], [0, 0, 42]]),
)
ENTRIES = st.one_of(
    FIELDS,
    st.fixed_dictionaries({"dtype": FIELDS, "shape": FIELDS, "data_offsets": FIELDS}),
)
FILES = st.sampled_from(
    ["one.safetensors", "two.safetensors", "none.safetensors", "../one.safetensors", "", ".", "\x00"]
)
INDEX = {"metadata": {"total_size": 42}, "weight_map": dict.fromkeys(["a", "b/kernel", "c", "d"], "one.safetensors")}

CASES = st.one_of(
    st.fixed_dictionaries({"kind": st.just("bytes"), "edits": edits()}),
    st.fixed_dictionaries({"kind": st.just("header"), "changes": CHANGES, "entry": ENTRIES, "edits": edits(1)}),
    st.fixed_dictionaries(
        {
            "kind": st.just("index"),
            "changes": CHANGES,
            "file": st.one_of(FILES, SCALARS),
            "edits": edits(1),
        }
    ),
)


def run(case: dict, folder: Path) -> None:
    one = folder / "one.safetensors"
    if case["kind"] == "bytes":
        one.write_bytes(edited(tensor_file(json.dumps(HEADER)), case["edits"]))
        _read(one)
    elif case["kind"] == "header":
        header = changed({**HEADER, "d": case["entry"]}, case["changes"])
        one.write_bytes(edited(tensor_file(json_text(header)), case["edits"]))
        _read(one)
        _read(folder)
    else:
        one.write_bytes(tensor_file(json.dumps(HEADER)))
        index = changed({**INDEX, "weight_map": {**INDEX["weight_map"], "d": case["file"]}}, case["changes"])
        text = json_text(index).encode()
        (folder / "model.safetensors.index.json").write_bytes(edited(text, case["edits"]))
        _read(folder)


def tensor_file(header: str) -> bytes:
    """A safetensors file with this header in front of BYTES."""
    text = header.encode()
    return len(text).to_bytes(8, "little") + text + BYTES


def _read(path: Path) -> None:
    reader = open_tensors(path)
    for name, shape in reader.shapes().items():
        assert np.array(reader.read(name)).shape == shape
    for key, value in reader.metadata.items():
        assert isinstance(key, str)
        assert isinstance(value, str) or path.is_dir()  # the metadata of an index holds numbers, too

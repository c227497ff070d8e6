"""The reader and writer against the safetensors library, and every way in which a file can be damaged."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moss_jax.checkpoint import TensorWriter, open_tensors, save_tensors
from moss_jax.checkpoint.safetensors import DTYPES
from moss_jax.errors import MossError

RNG = np.random.default_rng(0)


def tensors():
    return {
        "b/odd": RNG.integers(0, 255, 3, np.uint8),
        "a": RNG.normal(size=(2, 3)).astype(np.float32),
        "half": RNG.normal(size=(4,)).astype(ml_dtypes.bfloat16),
        "flag": np.array([True, False]),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }


def same(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def test_our_files_are_the_librarys_files(tmp_path):
    save_tensors(tmp_path / "ours.safetensors", tensors(), {"format": "pt"})
    data = tensors()
    save_tensors(tmp_path / "ours.safetensors", data, {"format": "pt"})
    same(load_file(tmp_path / "ours.safetensors"), data)
    save_file(data, tmp_path / "theirs.safetensors", {"who": "library"})
    reader = open_tensors(tmp_path / "theirs.safetensors")
    assert reader.metadata == {"who": "library"}
    same({name: reader.read(name) for name in reader.tensors}, data)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


def test_every_dtype_survives(tmp_path):
    data = {name: np.arange(4).astype(dtype) for name, dtype in DTYPES.items()}
    save_tensors(tmp_path / "x.safetensors", data)
    reader = open_tensors(tmp_path / "x.safetensors")
    same({name: reader.read(name) for name in data}, data)


def test_shards_and_index(tmp_path):
    data = {f"layer.{i}": RNG.normal(size=(10, 10)).astype(np.float32) for i in range(7)}
    with TensorWriter(tmp_path, data, shard_bytes=1000) as writer:
        for name in reversed(list(data)):
            writer.write(name, data[name])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    reader = open_tensors(tmp_path)
    same({name: reader.read(name) for name in reader.tensors}, data)


def test_writer_refuses_other_tensors(tmp_path):
    data = {"a": np.zeros((2, 2), np.float32)}
    with pytest.raises(ValueError, match="not written: a"), TensorWriter(tmp_path, data):
        pass
    with TensorWriter(tmp_path, data, "other") as writer:
        with pytest.raises(ValueError, match="expected"):
            writer.write("a", np.zeros((2, 2), np.float64))
        writer.write("a", data["a"])


def test_reading_and_writing_hold_one_tensor(tmp_path):
    shapes = {f"t{i}": np.broadcast_to(np.float32(i), (512, 512)) for i in range(16)}  # 1 MiB each
    tracemalloc.start()
    with TensorWriter(tmp_path, shapes, shard_bytes=5 << 20) as writer:
        for name, value in shapes.items():
            writer.write(name, value)
    reader = open_tensors(tmp_path)
    assert all(reader.read(f"t{i}")[3, 4] == i for i in range(16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * (1 << 20)


def _header(path, change):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


DAMAGE = {
    "cut in half": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "cut short"),
    "one byte short": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "cut short, it has"),
    "one byte more": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "longer than its header says"),
    "empty": (lambda p: p.write_bytes(b""), "not a safetensors file"),
    "text": (lambda p: p.write_text("hello, this is no tensor file"), "not a safetensors file"),
    "bad json": (lambda p: p.write_bytes((8).to_bytes(8, "little") + b"{'a': 1}"), "not valid JSON"),
    "json list": (lambda p: p.write_bytes((8).to_bytes(8, "little") + b"[1, 2]  "), "holds a JSON list"),
    "dtype": (lambda p: _header(p, lambda h: h["a"].update(dtype="F4")), "'a' has dtype 'F4'"),
    "shape": (lambda p: _header(p, lambda h: h["a"].update(shape=[2, 4])), "needs 32 bytes, has 24"),
    "negative": (lambda p: _header(p, lambda h: h["a"].update(shape=[-2, -3])), "no proper dtype, shape"),
    "no offsets": (lambda p: _header(p, lambda h: h["a"].pop("data_offsets")), "no proper dtype, shape"),
    "overlap": (lambda p: _header(p, lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"])), "overlaps"),
    "hole": (lambda p: _header(p, lambda h: h.pop("a")), "leaves a hole"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {name: np.ones((2, 3), np.float32) for name in "abc"})
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(MossError, match=message) as caught:
        open_tensors(path)
    assert "model.safetensors" in str(caught.value).splitlines()[0]


def test_index_errors(tmp_path):
    with pytest.raises(MossError, match="no safetensors file"):
        open_tensors(tmp_path)
    data = {f"layer.{i}": np.ones((10,), np.float32) for i in range(3)}
    with TensorWriter(tmp_path, data, shard_bytes=40) as writer:
        for name in data:
            writer.write(name, data[name])
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace('"layer.1"', '"layer.9"'))
    with pytest.raises(MossError, match=r"holds 'layer.1', which the index .* puts nowhere"):
        open_tensors(tmp_path)
    index.write_text(text.replace("model-00002-of", "../model-00002-of"))
    with pytest.raises(MossError, match="outside its folder"):
        open_tensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(MossError, match="which maps tensor names to file names, is not an object"):
        open_tensors(tmp_path)
    index.write_text(text)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(MossError, match="1 shard is missing: model-00003-of-00003"):
        open_tensors(tmp_path)
    index.unlink()
    with pytest.raises(MossError, match="2 safetensors files without an index"):
        open_tensors(tmp_path)


def test_files_of_several_gigabytes(tmp_path):
    """Offsets are not sizes, so the limit of sizes does not apply to them. The file is sparse."""
    size = 2**30
    header = {
        name: {"dtype": "U8", "shape": [size], "data_offsets": [i * size, i * size + size]}
        for i, name in enumerate("abc")
    }
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 3 * size)
    reader = open_tensors(path)
    assert reader.shapes() == {name: (size,) for name in "abc"}
    assert reader.read("c")[-1] == 0

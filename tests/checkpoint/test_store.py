import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moss_jax.checkpoint import load_tree, save_tree
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten


def tree():
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(3, 8, 16)).astype(np.float32)
    return {"layers": {"kernel": kernel, "scale": kernel[0, 0].astype(ml_dtypes.bfloat16)}, "ids": np.arange(4)}


def shapes():
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flatten(tree()).items()}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 1000])
def test_round_trip(tmp_path, shard_bytes):
    with jax.enable_x64(True):
        save_tree(tmp_path, tree(), shard_bytes=shard_bytes)
        loaded = flatten(load_tree(tmp_path, shapes()))
        cast = flatten(load_tree(tmp_path, shapes(), dtype=jnp.bfloat16))
    for path, leaf in flatten(tree()).items():
        assert loaded[path].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(loaded[path]), leaf)
    assert {path: str(leaf.dtype) for path, leaf in cast.items()} == {
        "layers/kernel": "bfloat16",
        "layers/scale": "bfloat16",
        "ids": "int64",
    }


def test_all_misfits_are_reported_at_once(tmp_path):
    save_tree(tmp_path, tree())
    wanted = shapes()
    wanted["layers/kernel"] = jax.ShapeDtypeStruct((3, 8, 17), jnp.float32)
    wanted["layers/bias"] = wanted.pop("ids")
    with pytest.raises(MossError) as caught:
        load_tree(tmp_path, wanted)
    first, *lines = str(caught.value).splitlines()
    assert "model.safetensors: 3 parameters do not fit" in first
    assert [line.strip() for line in lines] == [
        "misshapen: layers/kernel is [3, 8, 16], expected [3, 8, 17]",
        "missing: layers/bias [4]",
        "unexpected: ids [4]",
    ]


def test_each_device_of_a_mesh_reads_only_its_part(tmp_path):
    """In a process of its own, for the forced device count; counts the bytes that leave the mapped file."""
    save_tree(tmp_path, tree())
    code = f"""
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moss_jax.checkpoint import load_tree, store
mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
parts, original = [], store._converter
def counting(have, want):
    convert = original(have, want)
    return lambda view: parts.append(view.shape) or convert(view)
store._converter = counting
shapes = {{"layers/kernel": jax.ShapeDtypeStruct((3, 8, 16), "float32"),
          "layers/scale": jax.ShapeDtypeStruct((16,), "bfloat16"), "ids": jax.ShapeDtypeStruct((4,), "int32")}}
sharding = dict.fromkeys(shapes, NamedSharding(mesh, P())) | {{
    "layers/kernel": NamedSharding(mesh, P(None, "fsdp", "tensor"))}}
jax.config.update("jax_enable_x64", True)
kernel = load_tree({str(tmp_path)!r}, shapes, sharding)["layers"]["kernel"]
assert [p for p in parts if len(p) == 3] == [(3, 4, 4)] * 8, parts
assert kernel.addressable_shards[0].data.shape == (3, 4, 4)
print(float(kernel.sum()))
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(float(tree()["layers"]["kernel"].sum()), abs=1e-4)

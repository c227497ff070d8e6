"""The sharding rules, and equal results on one device and on meshes of eight.

Eight devices need their own process: `python tests/test_sharding.py` runs the comparison on a forced CPU mesh.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.errors import MossError
from moss_jax.generate import ChannelSettings, GenerationSettings, decode_chunk, new_state, prefill, request_keys
from moss_jax.nn.tree import param_axes, param_shapes, unflatten
from moss_jax.sharding import RULES, make_mesh, shardings_for
from moss_jax.speech_lm import MOSS_SPEECH_8B, TINY, LayerSplitModel
from tests import flags

GRID = jax.ShapeDtypeStruct((1, 8, 2), jnp.int32)
ROWS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
MESHES = [
    {"fsdp": 8},
    {"data": 4, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "sequence": 2},
]


def axes_and_shapes(config):
    model = LayerSplitModel(config)
    return param_axes(model, GRID, ROWS), param_shapes(model, GRID, ROWS)


class Devices:
    """An abstract mesh of any size, for tests of the rules."""

    def __new__(cls, **sizes):
        names = {name: sizes.get(name, 1) for name in ("data", "fsdp", "tensor", "sequence")}
        return jax.sharding.AbstractMesh(tuple(names.values()), tuple(names))


def test_the_mesh_size_is_the_number_of_devices():
    assert dict(make_mesh(data=len(jax.devices())).shape) == {
        "data": len(jax.devices()),
        "fsdp": 1,
        "tensor": 1,
        "sequence": 1,
    }
    with pytest.raises(MossError, match=r"fsdp 3.*needs 3 devices, there are \d+"):
        make_mesh(fsdp=3, devices=jax.devices()[:1])


def test_every_axis_of_the_model_has_a_rule_and_the_released_size_fits():
    axes, shapes = axes_and_shapes(MOSS_SPEECH_8B)
    assert axes.keys() == shapes.keys() and {name for names in axes.values() for name in names} <= set(RULES)
    for sizes in ({"fsdp": 256}, {"tensor": 8}, {"fsdp": 32, "tensor": 8}):
        shardings = shardings_for(axes, shapes, Devices(**sizes))
        total = sum(np.prod(shapes[path].shape, dtype=np.int64) for path in shapes)
        a_device = sum(np.prod(s.shard_shape(shapes[path].shape), dtype=np.int64) for path, s in shardings.items())
        assert a_device < total / np.prod(list(sizes.values())) * 1.01  # only norms are replicated


def test_a_dimension_that_is_not_divisible_is_an_error():
    axes, shapes = axes_and_shapes(MOSS_SPEECH_8B)
    with pytest.raises(MossError) as error:
        shardings_for(axes, shapes, Devices(tensor=256))
    assert "text/embed/embedding [151680, 4096]: axis 'vocab' of size 151680 is not divisible by the 256" in str(
        error.value
    )
    assert "axis 'kv_heads' of size 8 is not divisible by the 256 of 'tensor'" in str(error.value)


def test_two_axes_on_one_mesh_axis_are_an_error():
    axes, shapes = axes_and_shapes(TINY)
    with pytest.raises(MossError, match="'embed' and 'mlp' map to the same mesh axis 'tensor'"):
        shardings_for(axes, shapes, Devices(tensor=2), RULES | {"embed": ("tensor",)})


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(MossError, match="logical axis 'width' has no rule"):
        shardings_for({"x": ("width",)}, {"x": jnp.zeros(2)}, Devices())


@pytest.mark.slow
def test_eight_devices_give_the_logits_gradients_and_replies_of_one():
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"XLA_FLAGS": flags.devices(8), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.split() == ["same"] * len(MESHES)


def _compare_on_a_mesh():
    jax.config.update("jax_default_matmul_precision", "highest")
    config = replace(TINY, num_shared_layers=2, num_modality_layers=1)
    model = LayerSplitModel(config)
    axes, shapes = axes_and_shapes(config)
    rng = np.random.default_rng(0)
    flat = {k: rng.normal(k.endswith("scale"), 0.15, leaf.shape).astype(leaf.dtype) for k, leaf in shapes.items()}
    text = np.where(rng.random((8, 12)) < 0.5, config.modality_pad_id, rng.integers(0, 287, (8, 12)))
    grid = np.stack([text, rng.integers(0, 96, (8, 12))], -1).astype(np.int32)
    positions = np.arange(12)[None].repeat(8, 0)
    segments = np.ones((8, 12), np.int32)
    segments[3, :5] = 0

    def logits(params):
        return model.apply({"params": params}, grid, positions, segments)

    def loss(params):
        return sum(jnp.square(x).mean() for x in logits(params))

    def reply(params):
        settings = GenerationSettings(ChannelSettings(greedy=True), ChannelSettings(greedy=True), max_new_tokens=4)
        state = new_state(config, 8, 16)
        keys = request_keys(0, 8)
        state = prefill(params, state, grid, segments != 0, 12, keys, config=config)
        return decode_chunk(params, state, settings, 4, config=config).grid

    expected = (jax.jit(logits)(unflatten(flat)), reply(unflatten(flat)), jax.jit(jax.grad(loss))(unflatten(flat)))
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        shardings = shardings_for(axes, shapes, mesh)
        params = unflatten({path: jax.device_put(flat[path], shardings[path]) for path in flat})
        with jax.set_mesh(mesh):
            ours = jax.jit(logits)(params), reply(params), None
            if "sequence" in sizes:
                ours = *ours[:2], jax.jit(jax.grad(loss))(params)
        kernel = params["text"]["layers"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size * sizes.get("fsdp", 1) * sizes.get("tensor", 1) == kernel.size
        for mine, one in zip(ours, expected, strict=True):
            if mine is not None:
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), mine, one)
        np.testing.assert_array_equal(ours[1], expected[1])
        print("same")


if __name__ == "__main__":
    _compare_on_a_mesh()

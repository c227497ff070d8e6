"""Losses, gradients and steps on eight devices are those of one, however the mesh divides them.

Eight devices need a process of their own: `python -m tests.train.test_mesh`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import flags

MESHES = [{"fsdp": 8}, {"data": 2, "tensor": 2, "sequence": 2}, {"fsdp": 2, "sequence": 4}]


@pytest.mark.slow
def test_eight_devices_train_like_one():
    environment = {**os.environ, "XLA_FLAGS": flags.devices(8), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.train.test_mesh"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.split() == ["same"] * len(MESHES) + ["kernel"]


def main():
    from dataclasses import replace

    import jax
    import numpy as np

    from moss_jax.sharding import make_mesh
    from moss_jax.train.optimizer import OptimizerConfig
    from moss_jax.train.speech_lm.stages import STAGE_2, split_params
    from moss_jax.train.speech_lm.step import batch_shardings, make_step, state_shardings
    from moss_jax.train.state import init_state
    from tests.compilations import compilations
    from tests.train.small import SMALL, random_batch, random_params

    jax.config.update("jax_default_matmul_precision", "highest")
    config = replace(SMALL, num_shared_layers=1, remat="full")
    batch = random_batch()
    optimizer = OptimizerConfig(learning_rate=1e-3, total_steps=10, eps=1e-2)  # a smooth step: no signs of noise

    def trained(mesh, accumulate=1):
        trainable, _ = split_params(random_params(config), STAGE_2)
        step = make_step(config, STAGE_2, optimizer, sources=2, mesh=mesh, accumulate=accumulate)
        placed = batch
        if mesh is not None:
            trainable = jax.device_put(trainable, state_shardings(config, STAGE_2, optimizer, mesh).params)
            placed = jax.device_put(batch, batch_shardings(mesh, batch["positions"].shape))
        state = init_state(trainable, optimizer)
        all_metrics = []
        with compilations() as compiled:
            for _ in range(2):
                if mesh is None:
                    state, metrics = step(state, {}, placed)
                else:
                    with jax.set_mesh(mesh):
                        state, metrics = step(state, {}, placed)
                all_metrics.append(metrics)
        assert compiled.count("step") == 1
        return state, all_metrics

    one, metrics = trained(None)
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        state, ours = trained(mesh, accumulate=2 if "data" in sizes else 1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, metrics)
        # The first moment is the gradient, and the parameters have moved by it twice.
        for part in (lambda s: s.opt_state[1].mu, lambda s: s.params):
            for path, expected in part(one).items():
                scale = float(abs(expected).max())
                np.testing.assert_allclose(part(state)[path], expected, rtol=0, atol=1e-5 * scale, err_msg=path)
        kernel = state.opt_state[1].mu["shared/layers/mlp/up/kernel"]
        assert kernel.addressable_shards[0].data.size * sizes.get("fsdp", 1) * sizes.get("tensor", 1) == kernel.size
        print("same", flush=True)
    kernel_on_parts_of_the_queries()
    print("kernel")


def kernel_on_parts_of_the_queries():
    """The TPU kernel, interpreted, with heads and queries divided, against the whole attention."""
    import jax
    import numpy as np

    from moss_jax.nn.attention import attention, splash, splash_kernel
    from moss_jax.sharding import make_mesh, per_device

    rng = np.random.default_rng(0)
    shapes = (1, 256, 4, 128), (1, 256, 2, 128), (1, 256, 2, 128)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    segments = np.where(np.arange(256) < 160, 1, 2)[None].astype(np.int32)

    def run(q, k, v):
        kernel = splash_kernel(256, 4, 2, 2, interpret=True)
        queries = ("batch", "length", "heads", "head_dim")
        keys = ("batch", "all length", "kv_heads", "head_dim")
        axes = queries, keys, keys, ("batch", "length"), ("batch", "all length"), ("heads", "length")

        def local(q, k, v, segments, key_segments, kernel):
            return splash(q, k, v, segments, key_segment_ids=key_segments, kernel=kernel)

        return (per_device(local, axes, queries)(q, k, v, segments, segments, kernel) ** 2).sum()

    def whole(q, k, v):
        return (attention(q, k, v, segments, "xla") ** 2).sum()

    expected = jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(q, k, v)
    with jax.set_mesh(make_mesh(tensor=2, sequence=2, devices=jax.devices()[:4])):
        ours = jax.jit(jax.value_and_grad(run, (0, 1, 2)))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected)


if __name__ == "__main__":
    main()

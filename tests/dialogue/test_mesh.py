"""Eight devices generate the same as one. This needs a process of its own: `python -m tests.dialogue.test_mesh`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import flags

MESHES = [{"fsdp": 8}, {"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.slow
def test_eight_devices_give_the_grids_of_one():
    environment = {**os.environ, "XLA_FLAGS": flags.devices(8), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.dialogue.test_mesh"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["equal"] * len(MESHES)


def main():
    import jax
    import numpy as np

    from moss_jax.dialogue.conversation import LanguageModel
    from moss_jax.dialogue.turns import Turn
    from moss_jax.generate import ChannelSettings, GenerationSettings
    from moss_jax.nn.tree import flatten, param_axes, unflatten
    from moss_jax.sharding import make_mesh, shardings_for
    from moss_jax.speech_lm import TINY, LayerSplitModel
    from moss_jax.text.tokenizer import TextTokenizer
    from tests.tiny_speech_lm import random_params, tokenizer_json

    jax.config.update("jax_default_matmul_precision", "highest")
    tokenizer = TextTokenizer(tokenizer_json(TINY))
    params = flatten(random_params())
    grid = jax.ShapeDtypeStruct((1, 1, 2), np.int32), jax.ShapeDtypeStruct((1, 1), np.int32)
    channel = ChannelSettings(top_k=8, temperature=2.0)
    settings = GenerationSettings(text=channel, audio=channel, max_new_tokens=80)
    questions = [[Turn("user", text="hello " * i), Turn("user", codes=range(5 + i))] for i in range(8)]

    def replies(model):
        state, begin, _ = model.begin_batch(questions, "speech", settings)
        state = model.decode(state, settings, 100)
        return np.asarray(state.grid)[:, begin:], np.asarray(state.lengths), state

    expected, lengths, _ = replies(LanguageModel(TINY, unflatten(params), tokenizer))
    assert len(set(lengths)) > 1
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        placed = jax.device_put(params, shardings_for(param_axes(LayerSplitModel(TINY), *grid), params, mesh))
        ours, _, state = replies(LanguageModel(TINY, unflatten(placed), tokenizer, mesh=mesh))
        np.testing.assert_array_equal(ours, expected)
        assert len(state.caches["shared"].k.sharding.device_set) == 8
        assert not state.caches["shared"].k.is_fully_replicated
        print("equal", flush=True)


if __name__ == "__main__":
    main()

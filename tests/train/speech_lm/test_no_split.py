"""A model without a split, with both heads on the shared layers: training, decoding and starting from a Qwen3."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.convert.layer_split import new_audio_tables, qwen3_config, split_parameter
from moss_jax.errors import MossError
from moss_jax.nn.tree import unflatten
from moss_jax.speech_lm import LayerSplitModel, init_cache, model_shapes
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.speech_lm.stages import STAGE_1, STAGE_2, split_params
from moss_jax.train.speech_lm.step import make_step
from moss_jax.train.state import new_state
from tests.train.small import SMALL, random_batch, random_params

WHOLE = replace(SMALL, num_shared_layers=3, num_modality_layers=0)


def test_from_a_qwen3():
    """The text logits are those of the Qwen3 with and without a split; without one the branches have no layers."""
    source = qwen3_config(SMALL)
    qwen3 = random_params(source)
    grid = random_batch(SMALL, rows=2)["grid"].at[..., 0].set(5).at[..., 0, 0].set(7)
    positions = jnp.broadcast_to(jnp.arange(grid.shape[1]), grid.shape[:2])
    expected = jax.jit(LayerSplitModel(source).apply)({"params": unflatten(qwen3)}, grid, positions)[0]
    for config in (SMALL, WHOLE):
        flat = dict(new_audio_tables(config, 0))
        for path, value in qwen3.items():
            flat |= split_parameter(path, np.asarray(value), config)
        assert {path: x.shape for path, x in flat.items()} == {p: s.shape for p, s in model_shapes(config).items()}
        logits = jax.jit(LayerSplitModel(config).apply)({"params": unflatten(flat)}, grid, positions)[0]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert not any(path.startswith(("text/layers", "audio/layers")) for path in flat)


def test_with_and_without_a_cache():
    """Chunks through the cache give the audio logits of one pass; the caches of the branches are empty."""
    params = {"params": unflatten(random_params(WHOLE))}
    model = LayerSplitModel(WHOLE)
    grid = random_batch(WHOLE, rows=2, length=8)["grid"]
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))

    @jax.jit
    def in_parts(params):
        caches = init_cache(WHOLE, 2, 8)
        valid = jnp.ones((2, 8), bool)
        parts = []
        assert caches["audio"].k.shape[0] == 0
        for begin, end in ((0, 5), (5, 8)):
            x = model.apply(params, grid[:, begin:end], method="embed")
            for name in ("shared", "audio"):
                x, caches[name] = model.apply(
                    params,
                    name,
                    x,
                    positions[:, begin:end],
                    cache=caches[name],
                    index=begin,
                    valid=valid,
                    method="block",
                )
            parts.append(model.apply(params, "audio", x, method="logits"))
        return jnp.concatenate(parts, 1)

    whole = jax.jit(model.apply)(params, grid, positions)[1]
    np.testing.assert_allclose(in_parts(params), whole, atol=1e-5)


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2], ids=lambda stage: stage.name)
def test_it_trains(stage):
    trainable, frozen = split_params(random_params(WHOLE), stage)
    optimizer = OptimizerConfig(learning_rate=3e-3, total_steps=100)
    state = new_state(trainable, optimizer)
    step = make_step(WHOLE, stage, optimizer)
    batch = random_batch(WHOLE)
    losses = []
    for _ in range(4):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert any(path.startswith("shared/") for path in state.params) == (stage is STAGE_2)


def test_no_layers_at_all():
    with pytest.raises(MossError, match="has no layers, expected at least 1"):
        replace(SMALL, num_shared_layers=0, num_modality_layers=0)
    with pytest.raises(MossError, match="num_modality_layers is -1, expected at least 0"):
        replace(SMALL, num_modality_layers=-1)

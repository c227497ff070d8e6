"""Adapters: zero at the start, trainable over an unchanged base, and mergeable."""

import jax
import numpy as np
import pytest

from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten
from moss_jax.speech_lm import MOSS_SPEECH_8B
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.speech_lm.lora import Lora
from moss_jax.train.speech_lm.stages import (
    STAGE_2,
    Stage,
    join_params,
    split_params,
    stage_axes,
    stage_shapes,
    with_lora,
)
from moss_jax.train.speech_lm.step import make_eval_step, make_step
from moss_jax.train.state import init_state
from tests.train.small import SMALL, random_batch, random_params

LORA = Lora(rank=4, alpha=8, targets=("shared/layers/*/kernel", "audio/layers/attention/*/kernel"))
STAGE = with_lora(STAGE_2, LORA, ("audio/head/*",))
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, total_steps=10)


def test_adapters_train_and_merge():
    base = random_params()
    batch = random_batch()
    trainable, frozen = split_params(random_params(), STAGE)  # the step takes what trains
    evaluate = make_eval_step(SMALL, STAGE_2)
    unchanged = evaluate(base, {}, batch)["loss"]
    before = {path: np.asarray(value).tobytes() for path, value in frozen.items()}
    step = make_step(SMALL, STAGE, OPTIMIZER)
    state = init_state(trainable, OPTIMIZER)
    losses = []
    for _ in range(4):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], unchanged, rtol=1e-6)  # B is zero
    assert losses[-1] < losses[0] - 0.5
    assert {path: np.asarray(value).tobytes() for path, value in frozen.items()} == before
    adapted = make_eval_step(SMALL, STAGE)(state.params, frozen, batch)
    merged, again = (flatten(join_params(state.params, frozen, STAGE)) for _ in range(2))
    assert sorted(merged) == sorted(base)
    np.testing.assert_allclose(evaluate(merged, {}, batch)["loss"], adapted["loss"], rtol=1e-5)
    changed = {path for path in base if np.asarray(merged[path]).tobytes() != np.asarray(base[path]).tobytes()}
    assert changed == set(LORA.select(frozen)) | {"audio/head/kernel"}
    assert all(np.asarray(merged[path]).tobytes() == np.asarray(again[path]).tobytes() for path in merged)


def test_merging_keeps_the_dtype_of_the_base():
    trainable, frozen = split_params(random_params(dtype="bfloat16"), STAGE)
    joined = flatten(join_params(trainable, frozen, STAGE, dtype="bfloat16"))
    assert {str(value.dtype) for value in joined.values()} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, joined, random_params(dtype="bfloat16"))  # B is zero
    with pytest.raises(MossError, match="the stage that made them"):
        join_params(trainable, frozen)


def test_adapters_of_the_released_size():
    stage = with_lora(STAGE_2, Lora(rank=16))
    trainable, frozen = stage_shapes(MOSS_SPEECH_8B, stage, "bfloat16")
    a_layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    assert sum(leaf.size for leaf in trainable.values()) == 40 * a_layer == 48_496_640
    assert sum(leaf.size for leaf in frozen.values()) == 9_095_694_336
    axes, _ = stage_axes(MOSS_SPEECH_8B, stage)
    assert axes["lora/shared/layers/attention/o/a"] == ("layers", "heads", "head_dim", None)
    assert axes["lora/shared/layers/mlp/up/b"] == ("layers", None, "mlp")
    assert {path: len(names) for path, names in axes.items()} == {path: x.ndim for path, x in trainable.items()}


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        (Lora(targets=("shared/*/kernle",)), "target 'shared/\\*/kernle' matches no frozen parameter"),
        (Lora(targets=("text/head/*",)), "matches text/head/kernel, expected kernels of layers only"),
        (Lora(rank=0), "rank is 0"),
    ],
)
def test_what_is_refused(lora, problem):
    with pytest.raises(MossError, match=problem):
        split_params(random_params(), with_lora(STAGE_2, lora))
    with pytest.raises(MossError, match="expected one of them"):
        Stage("both", (), last_shared_layers=1, lora=lora)

"""The parameters that stages select; splitting and joining is lossless."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten
from moss_jax.speech_lm import MOSS_SPEECH_8B, TINY, model_shapes
from moss_jax.train.speech_lm.flops import peak_flops, token_flops
from moss_jax.train.speech_lm.stages import (
    SFT,
    SHARED_ONLY,
    STAGE_1,
    STAGE_2,
    Stage,
    join_params,
    layerwise,
    split_params,
    stage_axes,
    stage_shapes,
)
from tests.train.small import SMALL, random_params


def count(shapes):
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in shapes.values())


def test_the_stages_of_the_released_size_train_as_many_parameters_as_the_paper_says():
    trainable, frozen = stage_shapes(MOSS_SPEECH_8B, STAGE_1, "bfloat16")
    assert count(trainable) == 907_056_128 and count(frozen) == 9_095_694_336 - 907_056_128
    assert {leaf.dtype for leaf in trainable.values()} == {np.dtype(np.float32)}
    for stage in (STAGE_2, SFT):
        trainable, frozen = stage_shapes(MOSS_SPEECH_8B, stage)
        assert count(trainable) == 9_095_694_336 and not frozen
    assert count(stage_shapes(MOSS_SPEECH_8B, SHARED_ONLY)[0]) == 6_174_285_824
    trainable, frozen = stage_shapes(MOSS_SPEECH_8B, layerwise(8))
    assert count(frozen) == 24 * 192_946_432 and trainable["shared/layers/mlp/up/kernel"].shape[0] == 8


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2, SHARED_ONLY, layerwise(1), layerwise(2), layerwise(0)])
def test_joined_parts_are_the_parameters_bit_for_bit(stage):
    params = random_params()
    trainable, frozen = split_params(params, stage)
    joined = flatten(join_params(trainable, frozen))
    assert joined.keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, joined, params)
    axes = stage_axes(SMALL, stage)
    assert [part.keys() for part in axes] == [trainable.keys(), frozen.keys()]


def test_a_pattern_without_a_match_and_other_wrong_stages():
    with pytest.raises(MossError, match="stage odd: pattern 'audoi/\\*' matches no parameter"):
        Stage("odd", ("audio/*", "audoi/*")).select(model_shapes(TINY))
    with pytest.raises(MossError, match="has no trainable parameters"):
        split_params(random_params(), Stage("none", ()))
    with pytest.raises(MossError, match="last_shared_layers is 3, expected at most the model's 2"):
        split_params(random_params(), layerwise(3))


def test_flops_of_the_stages():
    config = replace(MOSS_SPEECH_8B)
    layer = 192_946_432 - 2 * 4096 - 2 * 128  # kernels
    heads = {"text": 621_281_280, "audio": 67_633_152}
    attention = 4 * 100 * 4096
    forward = 2 * (40 * layer + sum(heads.values())) + 40 * attention
    assert token_flops(config, STAGE_2, 100) == 3 * forward
    # Stage 1: no gradient of the frozen weights, which leaves a third of their products out.
    frozen = 36 * layer + heads["text"]
    assert token_flops(config, STAGE_1, 100) == 3 * forward - 2 * frozen
    # Nothing below the audio branch trains: the rest runs forward only.
    branch = Stage("branch", ("audio/layers/*", "audio/head/*", "audio/norm/*"))
    assert token_flops(config, branch, 100) == 3 * forward - 4 * frozen - 36 * 2 * attention
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12 and peak_flops("cpu") is None

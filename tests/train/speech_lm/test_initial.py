"""Initial parameters from every kind of folder equal those that a conversion writes."""

from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from moss_jax.checkpoint import open_tensors
from moss_jax.checkpoint.config_io import read_config
from moss_jax.checkpoint.system_folder import SYSTEM_FORMAT
from moss_jax.convert.language_model import import_language_model
from moss_jax.convert.qwen3 import import_qwen3
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.speech_lm import TINY, SpeechLMConfig
from moss_jax.train.speech_lm.initial import initial_params, initial_split
from moss_jax.train.speech_lm.stages import STAGE_1
from tests.convert.checkpoints import write_language_model, write_qwen3
from tests.train.small import SMALL


def same(flat, folder):
    reader = open_tensors(folder)
    assert sorted(flat) == sorted(reader.tensors)
    for path, value in flat.items():
        assert np.asarray(value).tobytes() == np.ascontiguousarray(reader.read(path)).tobytes(), path


@pytest.mark.parametrize("tied", [True, False])
def test_a_qwen3_becomes_what_convert_writes(tmp_path, tied):
    write_qwen3(tmp_path / "qwen3", tied)
    expected = import_qwen3(tmp_path / "qwen3", tmp_path / "system", modality_layers=2, codes=80, seed=3)
    config, flat = initial_params(tmp_path / "qwen3", modality_layers=2, codes=80, seed=3)
    assert config == expected
    same(flat, tmp_path / "system" / "transformer")


def test_a_released_folder_a_system_and_its_transformer_folder(tmp_path):
    write_language_model(tmp_path / "released")
    system = tmp_path / "system"
    expected = import_language_model(tmp_path / "released", system, print)
    (system / "system.json").write_text(f'{{"format": "{SYSTEM_FORMAT}"}}')
    for source in ("released", "system", "system/transformer"):
        config, flat = initial_params(tmp_path / source)
        assert config == expected
        same(flat, system / "transformer")
    wanted = replace(expected, dtype="float32", remat="full")
    assert initial_params(system, wanted)[0] == wanted
    with pytest.raises(MossError, match=r"not the model of the config\n  num_shared_layers is 3, expected 2"):
        initial_params(system, replace(TINY, num_shared_layers=2))
    assert read_config(SpeechLMConfig, read_json(system / "transformer" / "config.json"), "") == expected


def test_random_parameters_and_their_split():
    config, trainable, frozen = initial_split("random", STAGE_1, SMALL, frozen_dtype="bfloat16")
    assert {x.dtype for x in trainable.values()} == {np.dtype(np.float32)}
    assert {x.dtype for x in frozen.values()} == {np.dtype(ml_dtypes.bfloat16)}
    _, flat = initial_params("random", SMALL)
    assert config == SMALL and sorted(flat) == sorted({**trainable, **frozen})
    assert 0.015 < float(flat["shared/layers/mlp/up/kernel"].std()) < 0.025
    jax.tree.map(np.testing.assert_array_equal, trainable, {path: flat[path] for path in trainable})


@pytest.mark.parametrize(
    ("source", "problem"),
    [("nowhere", "no such folder"), ("empty", "no config.json"), ("other", "model_type is 'llama'")],
)
def test_what_is_no_source(tmp_path, source, problem):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MossError, match=problem):
        initial_params(tmp_path / source)


def test_random_needs_a_config():
    with pytest.raises(MossError, match="random parameters need a config"):
        initial_params("random")

"""From a system through a stage back to a system that answers, and on to the released layout."""

from dataclasses import replace

import numpy as np
import pytest

from moss_jax.checkpoint import open_tensors
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.cli import main
from moss_jax.convert.random_system import init_random
from moss_jax.data import Example, Mixture, write_examples
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.train import loop
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.speech_lm.lora import Lora
from moss_jax.train.speech_lm.run import Run
from moss_jax.train.speech_lm.stages import SFT, STAGE_1, with_lora


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "system"
    init_random(folder, say=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def data(system):
    config = SystemFolder(system).config(SPEECH_LM)
    random = np.random.default_rng(0)
    folder = system.parent / "data"

    def spoken(index):
        grid = np.full((20, 2), config.modality_pad_id, np.int32)
        grid[:, 1] = random.integers(0, config.eosp_id, 20)
        weights = np.zeros((20, 2), np.float32)
        weights[1:, 1] = 1
        return Example(grid, weights, str(index))

    write_examples(folder, map(spoken, range(10)), config)
    return folder


def trained(system, data, folder, stage):
    run = Run(
        name="t",
        folder=str(folder),
        init=str(system),
        stage=stage,
        optimizer=OptimizerConfig(1e-2, total_steps=2),
        data=Mixture((("spoken", str(data), 1.0),)),
        context=20,
        batch_size=2,
        steps=2,
        dtype="float32",
        frozen_dtype=None,
        remat="none",
    )
    assert loop.train(run, lambda line: None) == loop.DONE
    return folder / "exports/2"


def differing(one, other):
    before, after = (open_tensors(folder / "transformer") for folder in (one, other))
    assert before.shapes() == after.shapes()
    return {path for path in before.tensors if before.read(path).tobytes() != after.read(path).tobytes()}


@pytest.mark.slow
def test_stage_1_changes_the_audio_branch_alone_and_its_export_answers(system, data, tmp_path, capsys):
    export = trained(system, data, tmp_path / "run", STAGE_1)
    changed = differing(system, export)
    assert {"audio/embed/embedding", "audio/head/kernel", "audio/norm/scale"} <= changed
    assert all(path.startswith("audio/") for path in changed)
    assert main(["chat", "--model", str(export), "--text", "Hi", "--reply", "text", "--max-new-tokens", "3"]) == 0
    released = tmp_path / "released"
    assert main(["convert", "--model", str(export / "."), "--export", "released", "-o", str(released)]) in (0, 2)
    again = tmp_path / "next"  # the next stage starts from the run's folder
    assert differing(export, trained(tmp_path / "run", data, again, STAGE_1))
    assert main(["export", str(tmp_path / "run"), "--step", "2", "-o", str(tmp_path / "by_verb")]) == 0
    assert not differing(export, tmp_path / "by_verb")
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "by_verb")]) == 2
    assert "already exists" in capsys.readouterr().err


def test_adapters_are_merged_into_their_kernels_alone(system, data, tmp_path):
    stage = with_lora(SFT, Lora(rank=2, targets=("audio/layers/mlp/*/kernel",)))
    stage = replace(stage, lora=replace(stage.lora, alpha=4.0))
    changed = differing(system, trained(system, data, tmp_path / "run", stage))
    assert changed == {f"audio/layers/mlp/{name}/kernel" for name in ("gate", "up", "down")}

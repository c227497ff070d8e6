"""Runs as values: configs, --set, --print, and errors of one line."""

import json
from pathlib import Path

import pytest

from moss_jax import train
from moss_jax.cli import main
from moss_jax.data import Mixture
from moss_jax.errors import MossError
from moss_jax.speech_lm import model_shapes
from moss_jax.train import Run
from moss_jax.train.run import MeshSizes
from moss_jax.train.run_file import load_run, override, read_run, run_text
from moss_jax.train.speech_decoder.discriminators import DiscriminatorConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_survives_json(path, tmp_path):
    run = load_run(path)
    (tmp_path / "run.json").write_text(run_text(run))
    assert read_run(tmp_path) == run
    assert f"moss-jax train --config {path.relative_to(ROOT)}" in path.read_text().partition('"""\n\n')[0]


def test_the_public_names_exist():
    assert {name: getattr(train, name).__name__ for name in train.__all__} == {name: name for name in train.__all__}
    assert not hasattr(train, "Runs")


def test_there_are_configs():
    names = {path.stem for path in CONFIGS}
    assert {"stage1", "stage2", "sft", "sft_lora", "stage1_0.6b", "stage2_1.7b"} <= names


def stage1(*assignments):
    return load_run(next(path for path in CONFIGS if path.stem == "stage1_0.6b"), assignments)


def test_set_changes_fields_with_their_types():
    run = stage1(
        "steps=2000",
        "optimizer.learning_rate=1e-4",
        "mesh.tensor=2",
        "guard.spike=none",
        "tensorboard=true",
        "folder=runs/7",
        "data.sources=[('a', 'b', 2)]",
        "profile=(3, 5)",
        "frozen_dtype=none",
    )
    assert run.steps == run.optimizer.total_steps == 2000
    assert run.optimizer.learning_rate == 1e-4 and run.mesh.tensor == 2 and run.guard.spike is None
    assert run.tensorboard is True and run.folder == "runs/7" and run.profile == (3, 5) and run.frozen_dtype is None
    assert run.data.sources == (("a", "b", 2.0),)
    assert override(run, ["steps=3000", "optimizer.total_steps=4000"]).optimizer.total_steps == 4000


def vocoder(*assignments):
    return load_run(ROOT / "moss_jax/recipes/nano/configs/vocoder.py", assignments)


def test_a_group_of_fields_is_set_with_its_defaults():
    assert vocoder().objective.discriminators is None
    assert vocoder("objective.discriminators={}").objective.discriminators == DiscriminatorConfig()
    run = vocoder("objective.discriminators={'ffts': (256, 128)}", "objective.discriminators.fft_channels=8")
    assert run.objective.discriminators == DiscriminatorConfig(ffts=(256, 128), fft_channels=8)
    with pytest.raises(MossError, match=r"--set objective\.discriminators=\{\} for its defaults"):
        vocoder("objective.discriminators.ffts=(256, 128)")
    with pytest.raises(MossError, match=r"unknown: objective\.discriminators\.size"):
        vocoder("objective.discriminators={'size': 3}")


def test_fields_are_accepted_by_their_former_names(tmp_path):
    run = vocoder("guard.most=3", "average=0.5")
    assert run.guard.max_consecutive_skips == 3 and run.ema_decay == 0.5
    assert vocoder("guard={'most': 4}").guard.max_consecutive_skips == 4
    values = json.loads(run_text(run))
    values["average"] = values.pop("ema_decay")
    values["guard"]["most"] = values["guard"].pop("max_consecutive_skips")
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert read_run(tmp_path) == run


def test_data_is_set_on_the_command_line():
    run = stage1("data.sources=[('talks', 'DATA/talks', 9), ('books', 'DATA/books', 1)]")
    assert run.data.sources == (("talks", "DATA/talks", 9.0), ("books", "DATA/books", 1.0))
    held = stage1("held_out={'sources': [('talks', 'DATA/talks-valid', 1)]}").held_out
    assert held == Mixture((("talks", "DATA/talks-valid", 1.0),))
    with pytest.raises(MossError, match=r"data\.sources\[0\] has 2 entries, expected 3"):
        stage1("data.sources=[('talks', 'DATA/talks')]")
    with pytest.raises(MossError, match=r"missing: held_out\.sources"):
        stage1("held_out={}")


@pytest.mark.parametrize(
    "assignment, says",
    [
        ("steps", "--set steps: expected name=value"),
        ("stepz=3", "no field 'stepz', expected one of name, folder"),
        ("optimizer.lr=3", "no field 'optimizer.lr', expected one of learning_rate"),
        ("steps.more=3", "steps has no fields"),
        ("model.hidden_size=3", "model is none in this config"),
        ("steps=3.5", "steps is float 3.5, expected int"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate is str 'fast', expected float"),
        ("optimizer.learning_rate=-1", "learning_rate is -1.0, expected above 0"),
        ("tensorboard=3", "tensorboard is int 3, expected bool"),
        ("keep=1", "keep is 1, expected at least 2"),
        ("remat=some", "remat is 'some', expected one of none, dots, full"),
        ("batch_size=0", "batch_size is 0, expected a whole number above 0"),
        ("accumulate=3", "batch_size 16 does not divide into 3 parts"),
        ("data.sources=[]", "has no source"),
        ("profile=(5, 3)", "profile is (5, 3)"),
    ],
)
def test_wrong_values_are_reported_in_one_line(assignment, says):
    with pytest.raises(MossError) as caught:
        stage1(assignment)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("RUN = 3", "sets RUN to int, expected a moss_jax.train.Run"),
        ("", "sets RUN to nothing"),
        ("x = 1\nRUN = Run()", "line 2: NameError: name 'Run' is not defined"),
        ("RUN = (", "line 1: SyntaxError"),
    ],
)
def test_a_file_that_is_not_a_config(tmp_path, text, says):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(MossError) as caught:
        load_run(tmp_path / "c.py")
    assert says in str(caught.value)
    with pytest.raises(MossError, match="no such file"):
        load_run(tmp_path / "d.py")


def test_mesh_sizes():
    assert MeshSizes().for_devices(8) == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    assert MeshSizes(tensor=2).for_devices(8)["fsdp"] == 4
    assert MeshSizes(fsdp=1, tensor=4).for_devices(4)["tensor"] == 4
    for sizes in (MeshSizes(tensor=3), MeshSizes(fsdp=4), MeshSizes(data=0)):
        with pytest.raises(MossError, match="mesh data"):
            sizes.for_devices(8)


def test_print(capsys):
    assert (
        main(["train", "--config", str(ROOT / "configs/stage1.py"), "--print", "--init", "X", "--set", "steps=2000"])
        == 0
    )
    output = json.loads(capsys.readouterr().out)
    assert output["init"] == "X" and output["steps"] == 2000


def test_errors_of_the_verbs(tmp_path, capsys):
    for words, says in (
        (["train", "--config", "nowhere.py"], "nowhere.py: no such file"),
        (["train", "--config", str(ROOT / "configs/stage1.py"), "--set", "x=1"], "no field 'x'"),
        (["plot", str(tmp_path), "-o", "curves.png"], "no run.json in it"),
        (["plot", str(tmp_path), "-o", "curves.txt"], "expected one of .png"),
        (["export", str(tmp_path), "-o", str(tmp_path / "system")], "no run.json in it"),
    ):
        assert main(words) == 2
        output = capsys.readouterr().err
        assert says in output and output.count("\n") == 1


def test_the_stages_of_all_configs_select_parameters(tmp_path):
    from moss_jax.speech_lm.config import TINY

    for path in CONFIGS:
        run = load_run(path)
        if not isinstance(run, Run):
            continue
        stage = run.stage
        assert stage.select(model_shapes(TINY)) or stage.lora is not None

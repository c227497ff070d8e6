"""The nano recipe: sizes, configs that fit together, and a quick run of all steps."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.cli import main
from moss_jax.convert.random_system import SYSTEM_SIZES, init_random
from moss_jax.errors import MossError
from moss_jax.recipes.nano import ablation
from moss_jax.recipes.nano.corpus import TEXT_IDS, plan_corpus, text_tokenizer
from moss_jax.recipes.nano.sizes import LANGUAGE_MODEL
from moss_jax.recipes.nano.train import CONFIGS, Recipe, make_base, make_system
from moss_jax.speech_lm import model_shapes
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.text.tokenizer import TextTokenizer
from moss_jax.train import Run
from moss_jax.train.run import BaseRun

ROOT = Path(__file__).resolve().parents[2]
LANGUAGE = ("text", "stage1", "stage2", "sft")


def test_size_and_ids():
    size = sum(int(np.prod(leaf.shape)) for leaf in model_shapes(LANGUAGE_MODEL).values())
    assert 2.5e6 < size < 4e6
    assert {name: getattr(LANGUAGE_MODEL, name) for name in TEXT_IDS} == TEXT_IDS


def test_each_run_begins_where_another_ended():
    runs = {name: Recipe().run_config(name) for name in LANGUAGE}
    assert all(isinstance(run, Run) for run in runs.values())
    assert [runs[name].init for name in LANGUAGE] == ["random", "nano/qwen3", "nano/runs/stage1", "nano/runs/stage2"]
    assert {run.folder for run in runs.values()} == {f"nano/runs/{name}" for name in LANGUAGE}
    assert all(run.optimizer.total_steps == run.steps for run in runs.values())
    quick = {name: Recipe(quick=True).run_config(name) for name in LANGUAGE}
    assert all(run.steps == run.optimizer.total_steps == 4 and run.batch_size == 4 for run in quick.values())
    tenth = Recipe(share=0.1).run_config("speech_tokenizer")
    assert tenth.steps == tenth.optimizer.total_steps == Recipe().run_config("speech_tokenizer").steps // 10
    with pytest.raises(MossError, match="share is 0"):
        Recipe(share=0)


def test_a_base_and_a_system_of_parts(tmp_path):
    """What has another number of codes is refused, and then nothing is written."""
    init_random(tmp_path / "tiny", "tiny", say=lambda line: None)
    (tmp_path / "text_tokenizer.json").write_text(text_tokenizer(plan_corpus(scale=0.001)))
    make_base(tmp_path / "base", tmp_path / "text_tokenizer.json", tmp_path / "tiny")
    assert TextTokenizer.from_file(SystemFolder(tmp_path / "base").text_tokenizer_path, LANGUAGE_MODEL).decode(
        [*range(65, 68)]
    )
    parts = {"language_model": tmp_path / "tiny", "speech_decoder": tmp_path / "tiny"}
    make_system(tmp_path / "system", **parts)
    assert SystemFolder(tmp_path / "system").settings["default_voice"] is None
    assert SYSTEM_SIZES["tiny"].transformer == SystemFolder(tmp_path / "system").config(SPEECH_LM)
    config = tmp_path / "tiny" / "speech_decoder" / "config.json"
    values = json.loads(config.read_text())
    values["flow"]["codebook_size"] -= 1
    config.write_text(json.dumps(values))
    with pytest.raises(MossError, match="its flow has 255 codes, the language model 256"):
        make_system(tmp_path / "other", **parts)
    with pytest.raises(MossError, match="has no folder speech_tokenizer"):
        make_base(tmp_path / "another", tmp_path / "text_tokenizer.json", tmp_path)
    assert not (tmp_path / "other").exists() and not (tmp_path / "another").exists()


def test_the_package_has_a_config_for_every_training_run():
    names = {path.stem for path in CONFIGS.glob("*.py")}
    assert names == {"speech_tokenizer", "flow", "vocoder", *LANGUAGE}
    assert names <= {step.name for step in Recipe().steps()}
    assert all(isinstance(Recipe().run_config(name), BaseRun) for name in names)


def test_all_arms_make_the_same_number_of_updates():
    for seed in (0, 2):
        runs = {arm: ablation.runs_of(arm, seed, 1 / 3) for arm in ablation.ARMS}
        assert [[run.stage.name for run in own] for own in runs.values()] == [
            ["stage1", "stage2", "sft"],
            ["stage2", "stage2", "sft"],
            ["stage2", "stage2", "sft"],
        ]
        assert len({tuple((run.steps, run.data) for run in own) for own in runs.values()}) == 1
        assert [own[0].split for own in runs.values()] == [
            LANGUAGE_MODEL.num_modality_layers,
            LANGUAGE_MODEL.num_modality_layers,
            0,
        ]
        assert {own[0].init for own in runs.values()} == {"nano/qwen3"}
        assert all(b.init == a.folder for own in runs.values() for a, b in pairwise(own))
        everything = [run for own in runs.values() for run in own]
        assert {run.seed for run in everything} == {run.data.seed for run in everything} == {seed}
        assert len({run.folder for run in everything}) == 9


def test_table_of_made_up_results():
    one = {"stage1": (99, 100), "stage2": (90, 100), "tt": (50, 100), "st": (40, 100), "ss": (30, 100)}
    results = {
        "FP": [one, one | {"stage2": (94, 100)}, one | {"stage2": (92, 100)}],
        "NF": [one | {"stage1": (20, 100), "stage2": (60, 100)}] * 3,
        "NF-NoSplit": [{"stage2": (91, 100)}, {"stage2": (95, 100)}, {"stage2": (90, 100)}],
    }
    lines = ablation.table((99, 100), results).splitlines()
    assert lines[:6] == [
        "| training | seeds | text kept, stage 1 % | text kept, stage 2 % | T->T % | S->T % | S->S % |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| the text model, before | - | 99.0 | - | - | - | - |",
        "| FP | 3 | 99.0 ± 0.0 | 92.0 ± 2.0 | 50.0 ± 0.0 | 40.0 ± 0.0 | 30.0 ± 0.0 |",
        "| NF | 3 | 20.0 ± 0.0 | 60.0 ± 0.0 | 50.0 ± 0.0 | 40.0 ± 0.0 | 30.0 ± 0.0 |",
        "| NF-NoSplit | 3 | - | 92.0 ± 2.6 | - | - | - |",
    ]
    assert "FP - NF, text kept, stage 1: +79.0 points, beyond the larger spread over seeds (0.0)" in lines
    assert "FP - NF, text kept, stage 2: +32.0 points, beyond the larger spread over seeds (2.0)" in lines
    assert "FP - NF-NoSplit, text kept, stage 2: +0.0 points, within the larger spread over seeds (2.6)" in lines


@pytest.mark.long
@pytest.mark.slow
def test_the_whole_recipe_quickly(tmp_path, monkeypatch, capsys):
    """From nothing to a system that can be asked; and nothing is made twice."""
    monkeypatch.chdir(tmp_path)
    assert main(["train-nano", "--quick", "--no-report"]) == 0
    output = capsys.readouterr().err
    assert "[11/11] system: done in" in output
    assert main(["chat", "--model", "nano/system", "--text", "Hello.", "-o", "answer.wav"]) == 0
    assert (tmp_path / "answer.wav").stat().st_size > 0
    capsys.readouterr()
    assert main(["train-nano", "--quick", "--no-report"]) == 0
    assert capsys.readouterr().err.count("done before") == 11

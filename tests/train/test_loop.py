"""The loop in this process: one compilation, notices, the guard, repeated evaluations and exports, bad input."""

import contextlib
import json
import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest

from moss_jax.checkpoint import open_tensors
from moss_jax.errors import MossError
from moss_jax.train import export, loop
from moss_jax.train.checkpoints import Checkpoints
from moss_jax.train.run import Guard
from moss_jax.train.run_file import load_run, override
from moss_jax.train.speech_lm import task as language_model
from moss_jax.train.speech_lm.stages import STAGE_1
from tests.train import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("loop") / "data")


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Every run here compiles the same few programs: once is enough."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture
def run(data, tmp_path):
    return load_run(tiny.write_config(tmp_path / "run.py", data, tmp_path / "run"))


def entries(run, name="metrics.jsonl"):
    with open(f"{run.folder}/{name}") as file:
        return [json.loads(line) for line in file]


def train(run):
    lines = []
    return loop.train(run, lines.append), lines


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run: its entries, for comparison."""
    folder = tmp_path_factory.mktemp("whole")
    run = load_run(tiny.write_config(folder / "run.py", data, folder / "run"))
    code, lines = train(run)
    assert code == loop.DONE
    return run, lines


def same(found, expected, keys=("step", "loss", "text_loss", "audio_loss", "grad_norm")):
    assert [[entry.get(key) for key in keys] for entry in found] == [
        [entry.get(key) for key in keys] for entry in expected
    ]


def test_the_files_of_a_run(whole):
    run, lines = whole
    steps = entries(run)
    evaluations = entries(run, "evaluations.jsonl")
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    assert [entry["step"] for entry in evaluations] == [4, 8, 12]
    assert steps[-1]["loss"] < steps[0]["loss"] and evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert set(steps[0]["sources"]) == {"spoken", "written"}
    assert steps[-1]["tokens"] == 12 * run.batch_size * run.context
    for key in ("tokens_per_second", "step_seconds", "data_seconds", "data_share", "checkpoint_seconds", "memory_gib"):
        assert all(entry[key] >= 0 for entry in steps)
    assert any(entry["checkpoint_seconds"] > 0 for entry in steps)
    output = "\n".join(lines)
    assert "step 4/12  loss" in output and "held-out loss" in output and "tokens/s" in output
    assert not any("resuming" in line for line in lines)


def test_a_run_compiles_its_step_once(run, monkeypatch):
    steps = []
    make = language_model.make_step
    monkeypatch.setattr(
        language_model, "make_step", lambda *args, **options: steps.append(make(*args, **options)) or steps[-1]
    )
    assert train(run)[0] == loop.DONE
    assert train(override(run, ["steps=16"]))[0] == loop.DONE  # resumes from a checkpoint
    assert [step._cache_size() for step in steps] == [1, 1]


def test_the_next_step_is_started_before_metrics_are_fetched(run, monkeypatch):
    """But where the run pauses: at steps 4, 8 and 12."""
    events = []
    make = language_model.make_step
    fetch = jax.device_get

    def made(*args, **options):
        step = make(*args, **options)

        def logged(state, frozen, batch, limit):
            events.append("step")
            return step(state, frozen, batch, limit)

        return logged

    monkeypatch.setattr(language_model, "make_step", made)
    monkeypatch.setattr(jax, "device_get", lambda x: events.append("fetch") or fetch(x))
    assert train(replace(run, held_out=None))[0] == loop.DONE
    begin = events.index("step")
    between = ["step", "step", "fetch", "step", "fetch", "step", "fetch", "fetch"]
    assert events[begin:] == between * 3


def test_a_profile_of_some_steps(run):
    code, lines = train(replace(run, profile=(2, 3), held_out=None, steps=4))
    assert code == loop.DONE and any(line.startswith("profile of steps 2 to 3") for line in lines)
    assert list(tiny.Path(run.folder, "profile").rglob("*.xplane.pb"))


def test_changes_since_the_last_start_are_reported(run):
    train(replace(run, steps=4))
    lines = train(override(run, ["steps=8", "optimizer.learning_rate=1e-3", "data.seed=5"]))[1]
    (note,) = [line for line in lines if "changed since" in line]
    assert "optimizer.learning_rate 0.003 -> 0.001" in note and "data.seed 3 -> 5" in note and "steps 4 -> 8" in note
    assert any("belongs to other data" in line and "from step 5 on" in line for line in lines)


def test_a_preempted_run_resumes_exactly(run, whole):
    def notice(line):
        if line.startswith("step 4/"):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert loop.train(run, notice) == loop.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is before
    saved = entries(run)[-1]["step"]
    assert saved < 12
    code, lines = train(run)
    assert code == loop.DONE and any(f"resuming after step {saved} of 12" in line for line in lines)
    same(entries(run), entries(whole[0]))
    same(entries(run, "evaluations.jsonl"), entries(whole[0], "evaluations.jsonl"))


def test_a_lost_evaluation_and_export_are_repeated(run, whole, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("the machine went away")

    with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
        patch.setattr(language_model.Evaluation, "measure", broken)
        train(run)
    assert entries(run)[-1]["step"] == 4 and not entries(run, "evaluations.jsonl")
    with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
        patch.setattr(language_model, "export_system", broken)
        train(run)
    tiny.Path(run.folder, "exports/.12.new.part").mkdir(parents=True)
    assert [entry["step"] for entry in entries(run, "evaluations.jsonl")] == [4, 8, 12]
    code, lines = train(run)
    assert code == loop.DONE and any("exported" in line for line in lines)
    assert [path.name for path in tiny.Path(run.folder, "exports").iterdir()] == ["12"]
    same(entries(run), entries(whole[0]))
    same(entries(run, "evaluations.jsonl"), entries(whole[0], "evaluations.jsonl"))
    assert train(run)[1][-1].startswith("tiny: done after 12 steps")  # nothing is left to do


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(run, whole):
    train(run)
    files = sorted(
        (p for p in (tiny.Path(run.folder) / "checkpoints/12").rglob("*") if p.is_file()), key=os.path.getsize
    )
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 16
    files[-1].write_bytes(content)
    code, lines = train(run)
    (named,) = [line for line in lines if " is damaged: " in line]
    assert code == loop.DONE and files[-1].name in named and "has other contents" in named
    assert any("resuming after step 8" in line for line in lines)
    same(entries(run), entries(whole[0]))


def test_a_gradient_that_is_too_large_is_skipped_and_reported(run, monkeypatch):
    monkeypatch.setattr(loop.Watch, "limit", lambda self, step: 0.0 if step in (3, 7) else np.inf)
    code, lines = train(run)
    assert code == loop.DONE
    assert [entry["step"] for entry in entries(run) if entry["skipped"]] == [3, 7]
    assert [line.split(",")[0] for line in lines if "skipped" in line] == ["step 3: skipped", "step 7: skipped"]


@pytest.mark.parametrize("guard, last", [(Guard(action="stop"), 6), (Guard(max_consecutive_skips=3), 8)])
def test_the_guard_stops_a_run(run, monkeypatch, guard, last):
    monkeypatch.setattr(loop.Watch, "limit", lambda self, step: 0.0 if step >= 6 else np.inf)
    code, lines = train(replace(run, guard=guard))
    assert (
        code == loop.STOPPED and "stopped at step" in lines[-1] and "the last checkpoint is that of step 4" in lines[-1]
    )
    assert entries(run)[-1]["step"] == last


def test_frozen_parameters_are_exported_bit_identically(run, data, tmp_path):
    run = replace(run, stage=STAGE_1, frozen_dtype="bfloat16", export_dtype="float32")
    kept = {}
    split = language_model.starting_parameters

    def remember(*args):
        config, trainable, frozen = split(*args)
        kept.update({path: np.asarray(value).tobytes() for path, value in frozen.items()})
        return config, trainable, frozen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "starting_parameters", remember)
        assert train(run)[0] == loop.DONE
    assert kept and not any(path.startswith("audio/") for path in kept)
    by_verb = tmp_path / "system"
    export.export_checkpoint(run.folder, by_verb, say=lambda line: None)
    for folder in (tiny.Path(run.folder) / "exports/12", by_verb):
        reader = open_tensors(folder / "transformer")
        assert {p: reader.read(p).tobytes() for p in kept} == kept
        assert {p for p in reader.tensors if p.startswith("audio/")} == set(reader.tensors) - set(kept)
        assert all(reader.tensors[p].dtype == np.float32 for p in set(reader.tensors) - set(kept))
    with pytest.raises(MossError, match=r"no checkpoint of step 5, existing ones: 4, 8, 12"):
        export.export_checkpoint(run.folder, tmp_path / "other", step=5)


@pytest.mark.parametrize(
    "settings, says",
    [
        (["model.hidden_size=64"], "of another architecture (hidden_size is 32, this run's is 64)"),
        (["stage.trainable=['audio/*']"], "of another stage (trainable is"),
        (["mesh.tensor=3"], "does not fit 1 devices"),
        (["batch_size=7", "accumulate=2"], "batch_size 7 does not divide into 2 parts"),
        (["init=nowhere"], "nowhere"),
        (["data.sources=[('spoken', 'nowhere', 1.0)]"], "nowhere"),
        (["steps=lots"], "steps is str 'lots', expected int"),
        (["optimizer.rate=1"], "no field 'optimizer.rate', expected one of learning_rate"),
        (["guard.action=hope"], "guard.action is 'hope', expected one of skip, stop"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_lost(whole, settings, says):
    run = whole[0]
    before = entries(run)
    with pytest.raises(MossError) as caught:
        train(override(run, settings))
    assert says in str(caught.value).partition("\n")[0]
    assert entries(run) == before and Checkpoints(f"{run.folder}/checkpoints").newest_complete() == 12


def test_a_full_disk_keeps_what_was_saved(run, monkeypatch):
    import orbax.checkpoint as ocp

    save = ocp.CheckpointManager.save

    def full(self, step, *args, **options):
        if step == 8:
            raise OSError(28, "No space left on device")
        return save(self, step, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(MossError) as caught:
        patch.setattr(ocp.CheckpointManager, "save", full)
        train(run)
    assert "checkpoints/8: cannot be saved (No space left on device); the newest complete checkpoint is 4" in str(
        caught.value
    )
    code, lines = train(run)
    assert code == loop.DONE and any("resuming after step 4" in line for line in lines)


def test_an_unwritable_folder(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MossError, match="cannot be written"):
        train(replace(run, folder=str(tmp_path / "file" / "run")))

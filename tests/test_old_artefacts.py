"""What version 0.1.0 wrote still loads and still gives the same results.

The files and how they were made are described in tests/data/version_0_1/README.md.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

import moss_jax
from moss_jax.checkpoint import open_tensors
from moss_jax.checkpoint.old_names import old_path
from moss_jax.cli import main

DATA = Path(__file__).parent / "data" / "version_0_1"
EXPECTED = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))

LONG = (pytest.mark.slow, pytest.mark.long)
RUNS = [
    "language_model",
    "adapters",
    pytest.param("speech_tokenizer", marks=LONG),
    pytest.param("flow", marks=LONG),
]

# The run that a folder's run.json describes. A config file of a user may say the same.
CONFIG = """
from moss_jax.train.run_file import read_run

RUN = read_run({folder!r})
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The unpacked archive, which tests only read."""
    folder = tmp_path_factory.mktemp("version_0_1")
    with tarfile.open(DATA / "artefacts.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def system(unpacked):
    return moss_jax.load(unpacked / "system")


@pytest.fixture(scope="module")
def nano():
    return moss_jax.load()


@pytest.fixture
def workspace(unpacked, tmp_path, monkeypatch):
    """A copy of everything as the working directory: the paths in the runs are relative to it."""
    folder = tmp_path / "workspace"
    shutil.copytree(unpacked, folder)
    monkeypatch.chdir(folder)
    return folder


def check_reply(reply, name):
    expected = EXPECTED[name]
    assert reply.text == expected["text"]
    assert reply.codes.tolist() == expected["codes"]
    assert reply.complete == expected["complete"]
    if "samples" in expected:
        assert reply.wave.size == expected["samples"]
    if "every_400th_sample" in expected:
        np.testing.assert_allclose(reply.wave[::400], expected["every_400th_sample"], atol=2e-3)


def train(name, *settings):
    """Runs `moss-jax train` with the run in runs/NAME/run.json."""
    config = Path(f"{name}.py")
    config.write_text(CONFIG.format(folder=f"runs/{name}"))
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    assert main(["train", "--config", str(config), *arguments]) == 0


def metrics(name):
    """The entries of runs/NAME/metrics.jsonl."""
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


def chat(capsys, system, *arguments):
    capsys.readouterr()
    assert main(["chat", "--model", str(system), *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_system_replies_with_the_same_codes(system, unpacked):
    question = [moss_jax.Turn("user", audio=unpacked / "recordings" / "0.flac")]
    check_reply(system.reply(question), "spoken_question")


def test_the_system_replies_with_the_same_text(system, unpacked, capsys):
    check_reply(system.reply([moss_jax.Turn("user", text="hello")], reply="text"), "written_question")
    drawn = system.reply([moss_jax.Turn("user", text="hello")], reply="text", temperature=3.0, seed=1)
    check_reply(drawn, "drawn_text")
    out = chat(capsys, unpacked / "system", "--text", "hello", "--reply", "text")
    assert out.strip() == EXPECTED["written_question"]["text"]


def test_the_conversation_resumes(system, unpacked):
    for reply, name in (("speech", "second_turn"), ("text", "second_turn_written")):
        conversation = system.resume(unpacked / "conversation.safetensors")
        question = [moss_jax.Turn("user", text="And?")]
        check_reply(system.reply(question, reply=reply, conversation=conversation), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_from_its_checkpoint(workspace, capsys, name):
    before = metrics(name)
    capsys.readouterr()
    train(name, "steps=3")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    # The run finds the weights that init names, and the data, as they were.
    assert not any("frozen weights" in note or "batches" in note for note in notes)
    entries = metrics(name)
    assert entries[:-1] == before
    assert entries[-1]["step"] == 3
    for key, value in EXPECTED["step_3"][name].items():
        assert entries[-1][key] == pytest.approx(value, rel=1e-3), key
    assert (workspace / "runs" / name / "exports" / "3").is_dir()


def check_same_weights(folder, expected):
    files = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert weights
    for file in weights:
        old = open_tensors(expected / file)
        new = open_tensors(folder / file)
        # Attention projections of the speech tokenizer and the flow were named query, key, value and out.
        assert {old_path(name) for name in new.tensors} == {old_path(name) for name in old.tensors}, file
        stored = {old_path(name): name for name in old.tensors}
        for name in new.tensors:
            value = new.read(name)
            former = old.read(stored[old_path(name)])
            assert value.dtype == former.dtype, name
            assert value.tobytes() == former.tobytes(), name


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_exports_to_the_same_weights(workspace, name):
    assert main(["export", f"runs/{name}", "-o", "again"]) == 0
    check_same_weights(Path("again"), Path("runs", name, "exports", "2"))


def test_a_checkpoint_exports_in_another_dtype(workspace):
    assert main(["export", "runs/language_model", "--dtype", "float32", "-o", "again"]) == 0
    check_same_weights(Path("again"), Path("exported"))


@pytest.mark.slow
def test_the_export_replies_with_the_same_codes(unpacked):
    exported = moss_jax.load(unpacked / "exported")
    check_reply(exported.reply([moss_jax.Turn("user", audio=unpacked / "recordings" / "0.flac")]), "exported")


@pytest.mark.slow
@pytest.mark.parametrize("init", ["exported", "runs/language_model"])
def test_a_run_can_start_from_an_export_or_an_earlier_run(workspace, init):
    train("language_model", "folder=runs/next", f"init={init}", "steps=1", "held_out=none")
    assert [entry["step"] for entry in metrics("next")] == [1]
    assert metrics("next")[0]["loss"] < metrics("language_model")[0]["loss"]


@pytest.mark.slow
def test_nano_replies_with_the_same_codes(nano):
    question = [moss_jax.Turn("user", audio=nano.folder.path / "question.wav")]
    check_reply(nano.reply(question), "nano_spoken")
    check_reply(nano.reply(question, reply="text"), "nano_written")

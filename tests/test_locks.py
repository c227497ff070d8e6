"""Two processes with one output folder: the second is refused and changes nothing; a killed one leaves no lock."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jax.cli import main
from moss_jax.data.store import Examples
from moss_jax.errors import MossError
from moss_jax.files import output_lock
from moss_jax.recipes.recipe import RecipeStep, run_recipe
from moss_jax.train.run_file import load_run, run_text
from tests.test_files import HOLD
from tests.train import tiny
from tests.train.places import Place

HOLD_OUTPUT = """
import sys
from moss_jax.files import output_lock
with output_lock(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])):
    print("locked", flush=True)
    sys.stdin.read()
"""
REFUSED = "another process is writing to this folder"


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locks") / "system"
    assert main(["init-random", str(folder)]) == 0
    return folder


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps({"text": f"Sentence number {i}."}) + "\n" for i in range(12)))
    return path


@pytest.fixture
def hold():
    """Starts a process that holds a lock until the end of the test."""
    processes = []

    def start(code, *arguments):
        words = [sys.executable, "-c", code, *map(str, arguments)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """{path: (bytes, modification time)} of every file below a folder except lock files."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def refused(words, folder, capsys):
    """The verb ends with 2 and one line about the lock, and no file of `folder` has changed."""
    before = content(folder)
    capsys.readouterr()
    assert main(list(map(str, words))) == 2
    output = capsys.readouterr().err
    assert REFUSED in output and output.count("\n") == 1
    assert content(folder) == before


def test_train(tmp_path, capsys, hold):
    config = tiny.write_config(tmp_path / "run.py", tmp_path / "data", tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    hold(HOLD, tmp_path / "run")
    refused(["train", "--config", config], tmp_path, capsys)


def test_tokenize(tmp_path, system, manifest, capsys, hold):
    words = ["tokenize", manifest, "--model", system, "--format", "text", "-o", tmp_path / "out"]
    part = tmp_path / "out.part"
    part.mkdir()
    (part / "settings.json").write_text("{}")  # of the running process
    other = hold(HOLD_OUTPUT, tmp_path / "out", 0, 1)
    refused(words, tmp_path, capsys)
    refused([*words, "--process", "1/2"], tmp_path, capsys)  # would write shards that the other process writes too
    pytest.importorskip("librosa")
    refused([*words[:5], "decoder", *words[6:]], tmp_path, capsys)
    other.send_signal(signal.SIGKILL)
    other.wait()
    (part / "settings.json").unlink()
    assert main(list(map(str, words))) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"books.jsonl", "out"}


def test_a_share_made_by_two_processes(tmp_path, system, manifest, capsys, hold):
    words = ["tokenize", manifest, "--model", system, "--format", "text", "-o", tmp_path / "out"]
    hold(HOLD_OUTPUT, tmp_path / "out", 0, 2)
    refused([*words, "--process", "0/2"], tmp_path, capsys)
    refused([*words, "--process", "2/3"], tmp_path, capsys)
    assert main([*map(str, words), "--process", "1/2", "--shard-documents", "3"]) == 0
    assert len(list((tmp_path / "out.part").glob("shard-*.json"))) == 2


def test_encode_manifests(tmp_path, system, manifest, capsys, hold):
    words = ["encode", "--manifests", manifest, "--model", system, "-o", tmp_path / "coded"]
    hold(HOLD, tmp_path / "coded")
    refused(words, tmp_path, capsys)


@pytest.mark.parametrize("more", [[], ["--nano"]], ids=["small", "nano"])
def test_corpus(tmp_path, capsys, hold, more):
    hold(HOLD_OUTPUT, tmp_path / "corpus", 0, 1)
    refused(["corpus", tmp_path / "corpus", *more], tmp_path, capsys)


def test_export(tmp_path, capsys, hold):
    config = tiny.write_config(tmp_path / "run.py", tmp_path / "data", tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(run_text(load_run(config)))
    hold(HOLD_OUTPUT, tmp_path / "system", 0, 1)
    refused(["export", tmp_path / "run", "-o", tmp_path / "system"], tmp_path, capsys)


def test_a_recipe(tmp_path, monkeypatch, capsys, hold):
    hold(HOLD, tmp_path / "nano")
    monkeypatch.chdir(tmp_path)
    refused(["train-nano", "--no-report", "--quick"], tmp_path, capsys)
    with pytest.raises(MossError, match=REFUSED):
        run_recipe(tmp_path / "nano", [RecipeStep("one", "", lambda: 0)], {})


def test_the_lock_of_an_output_leaves_nothing(tmp_path):
    for name in ("data", "a" * 240, "[x]*"):
        with output_lock(tmp_path / name), pytest.raises(MossError, match=REFUSED), output_lock(tmp_path / name, 0, 2):
            pass
        with output_lock(tmp_path / name, 0, 2), output_lock(tmp_path / name, 1, 2):
            pass
    with pytest.raises(ZeroDivisionError), output_lock(tmp_path / "data"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MossError, match="cannot be written"), output_lock("/dev/null/data"):
        pass


def start(words, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "moss_jax", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny.ROOT), **environment},
    )


@pytest.mark.slow
def test_shares_of_a_data_set_in_parallel(tmp_path, system, manifest):
    """Two processes share the work while two others ask for the same shares: the data set is that of one process."""
    words = ["tokenize", manifest, "--model", system, "--format", "text", "--shard-documents", "2", "-o"]
    assert main(list(map(str, [*words, tmp_path / "alone"]))) == 0
    shares = [start([*words, tmp_path / "out", "--process", f"{index}/2"]) for index in (0, 1, 0, 1)]
    output = [share.communicate(timeout=300)[0] for share in shares]
    codes = [share.returncode for share in shares]
    assert 0 in (codes[0], codes[2]) and 0 in (codes[1], codes[3]), output
    for code, text in zip(codes, output, strict=True):
        assert code == 0 or (code == 2 and REFUSED in text), text
    one, other = (
        [(e.name, e.grid.tolist()) for e in map(Examples(tmp_path / name).__getitem__, range(12))]
        for name in ("alone", "out")
    )
    assert one == other
    assert {path.name for path in tmp_path.iterdir()} == {"books.jsonl", "alone", "out"}


@pytest.mark.slow
def test_all_processes_of_a_second_run_end(tmp_path, hold):
    """The first process of a run takes the lock for all of them, and all end when it is refused."""
    place = Place(tmp_path, steps=4, save_every=2)
    hold(HOLD, tmp_path / "two")
    processes = place.start_two("two")
    output = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], output
    assert REFUSED in output[0] and "the first process of the run cannot write to this folder" in output[1]
    assert content(tmp_path / "two") == {}


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_killed_one_resumes(tmp_path, capsys):
    data = tiny.write_data(tmp_path / "data")
    config = tiny.write_config(tmp_path / "run.py", data, tmp_path / "run")
    settings = ["save_every=2", "evaluate_every=0", "log_every=1", "held_out=none"]

    def checkpoints():
        return [int(path.name) for path in (tmp_path / "run/checkpoints").glob("*") if path.name.isdigit()]

    first = subprocess.Popen(
        tiny.command(config, *settings, "steps=100000"),
        env=tiny.environment(),
        cwd=tiny.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while not checkpoints():
            assert first.stdout.readline(), "the run has ended"
        assert main(["train", "--config", str(config), "--set", "steps=8"]) == 2
        assert REFUSED in capsys.readouterr().err
    finally:
        first.kill()
        first.communicate()
    last = max(checkpoints())
    again = tiny.run(config, *settings, f"steps={last + 2}")
    assert again.returncode == 0, again.stderr
    assert "done after" in again.stderr
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, last + 3))

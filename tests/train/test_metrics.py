"""What a run tells: metrics files, the progress line, the guard's limits, curves."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from moss_jax.cli import main
from moss_jax.errors import MossError
from moss_jax.train.guard import Watch
from moss_jax.train.metrics import Board, MetricsFile, by_source, duration, progress_line, read_entries
from moss_jax.train.run import Guard, run_text
from tests.train.test_run import stage1


def entry(step, loss=2.0):
    return {
        "step": step, "loss": loss, "text_loss": 1.5, "audio_loss": 0.5, "text_count": 3.0, "audio_count": 2.0,
        "grad_norm": 1.25, "learning_rate": 1e-3, "tokens_per_second": 12345.0, "step_seconds": 2.0, "data_share": 0.01,
        "mfu": 0.41,
    }  # fmt: skip


def test_a_metrics_file_is_cut_back_and_never_holds_a_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.write(entry(step))
    file.close()
    with path.open("a") as text:
        text.write('{"step": 6, "lo')  # killed in the middle of a line
    file = MetricsFile(path, 3)
    assert file.has(3) and not file.has(5)
    file.write(entry(4, loss=math.nan))
    file.sync()
    file.close()
    entries = read_entries(path)
    assert [e["step"] for e in entries] == [1, 2, 3, 4]
    assert math.isnan(float(entries[-1]["loss"])) and json.loads(path.read_text().splitlines()[-1])["loss"] == "nan"


def test_a_full_disk_is_told(tmp_path):
    with pytest.raises(MossError, match="cannot be written"):
        MetricsFile(tmp_path / "nowhere/metrics.jsonl", 0)
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file._file.close()
    file._file = Path("/dev/full").open("w")  # noqa: SIM115, closed by the file
    with pytest.raises(MossError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        file.write(entry(1))
    with pytest.raises(MossError):
        file.close()


def test_the_progress_line():
    line = progress_line(entry(30), 100)
    assert line.startswith("step 30/100  loss 2.0000 (text 1.5000, audio 0.5000)  grad 1.25  lr 1.00e-03")
    assert "12.3k tokens/s" in line and "MFU 41.0%" in line and line.endswith("2 min left")
    assert [duration(s) for s in (0.0123, 3.44, 300, 27000)] == ["12 ms", "3.4 s", "5 min", "7 h 30 min"]


def test_sources_by_name():
    metrics = {
        "source_text_sum": np.asarray([4.0, 0.0]), "source_text_count": np.asarray([2.0, 0.0]),
        "source_audio_sum": np.asarray([9.0, 0.0]), "source_audio_count": np.asarray([3.0, 0.0]),
    }  # fmt: skip
    expected = {"a": {"text_loss": 2.0, "text_count": 2.0, "audio_loss": 3.0, "audio_count": 3.0}}
    assert by_source(metrics, ("a", "b")) == expected


def test_the_limit_is_a_function_of_the_updates_up_to_the_second_before():
    watch = Watch(Guard(spike=3.0, window=4))
    assert watch.limit(1) == math.inf
    for step, norm in enumerate((1.0, 2.0, 4.0, 8.0), 1):
        assert watch.add(step, norm, False) is None
    assert watch.limit(3) == math.inf  # it would know step 1 alone
    assert watch.limit(4) == 3.0 * 1.5 and watch.limit(6) == 3.0 * 3.0
    other = Watch(Guard(spike=3.0, window=4))
    other.restore(json.loads(json.dumps(watch.state())))
    assert other.limit(6) == watch.limit(6)
    assert watch.add(5, math.nan, True) is None and watch.limit(7) == 3.0 * 3.0
    assert Watch(Guard(spike=None)).limit(1000) == math.inf


def test_the_guard_gives_up():
    assert Watch(Guard(action="stop")).add(1, math.inf, True)
    watch = Watch(Guard(most=2))
    assert watch.add(1, 1.0, True) is None and watch.add(2, 1.0, False) is None
    assert watch.add(3, 1.0, True) is None and "2 updates in a row" in watch.add(4, 1.0, True)


def test_tensorboard_gets_every_number(tmp_path):
    board_module = pytest.importorskip("tensorboardX")
    assert board_module
    board = Board(tmp_path, True, None, "run", {})
    board.write("train", entry(1) | {"sources": {"a": {"text_loss": 3.5}}})
    board.close()
    (written,) = (tmp_path / "tensorboard").iterdir()
    content = written.read_bytes()
    assert b"train/loss" in content and b"train/sources/a/text_loss" in content


def test_wandb_gets_every_number(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)),
        finish=lambda: calls.append("finished"),
    )
    module = ModuleType("wandb")
    module.init = lambda **settings: calls.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    board = Board(tmp_path, False, "project", "run", {"seed": 3})
    board.write("train", entry(1) | {"sources": {"a": {"text_loss": 3.5}}})
    board.close()
    begun, (step, numbers), ended = calls
    assert begun == {"project": "project", "name": "run", "id": "run", "resume": "allow", "config": {"seed": 3}}
    assert step == 1 and numbers["train/sources/a/text_loss"] == 3.5 and numbers["train/loss"] == entry(1)["loss"]
    assert ended == "finished"


def test_curves(tmp_path, capsys):
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(run_text(stage1(f"name={name}")))
        file = MetricsFile(folder / "metrics.jsonl", 0)
        for step in range(1, 80):
            file.write(entry(step, 2 + 1 / step))
        file.close()
    held_out = MetricsFile(tmp_path / "two/evaluations.jsonl", 0)
    held_out.write({"step": 40, "loss": 2.0, "text_loss": 1.0, "audio_loss": 0.0})
    held_out.close()
    target = tmp_path / "curves.png"
    assert main(["plot", str(tmp_path / "one"), str(tmp_path / "two"), "-o", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 10_000
    (tmp_path / "one/metrics.jsonl").write_text("")
    assert main(["plot", str(tmp_path / "one"), "-o", str(target)]) == 2
    assert "no step in it yet" in capsys.readouterr().err

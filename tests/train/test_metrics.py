"""What a run records: metrics files, the progress line, the limits of the guard, curves."""

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
from moss_jax.train.metrics import Board, IntervalMetrics, MetricsFile, by_source, measured, read_entries
from moss_jax.train.run import Guard
from moss_jax.train.run_file import run_text
from tests.train.test_run import stage1


def entry(step, loss=2.0):
    return {
        "step": step,
        "loss": loss,
        "text_loss": 1.5,
        "audio_loss": 0.5,
        "text_count": 3.0,
        "audio_count": 2.0,
        "grad_norm": 1.25,
        "learning_rate": 1e-3,
        "tokens_per_second": 12345.0,
        "step_seconds": 2.0,
        "data_share": 0.01,
        "data_seconds": 0.02,
        "skipped": 0.0,
        "mfu": 0.41,
    }


def test_a_metrics_file_is_truncated_and_never_has_a_step_twice(tmp_path):
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


def test_a_full_disk_is_reported(tmp_path):
    with pytest.raises(MossError, match="cannot be written"):
        MetricsFile(tmp_path / "nowhere/metrics.jsonl", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *_, **__: open("/dev/full", "w"))  # noqa: SIM115, closed by the file
        file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(MossError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        file.write(entry(1))
    with pytest.raises(MossError):
        file.close()


def test_the_progress_line():
    progress = IntervalMetrics(("text_loss", "audio_loss"), {}, "tokens", peak=1e12)
    progress.add(entry(30), flops=8.2e11)
    line = progress.line(entry(30), 100)
    assert line.startswith("step 30/100  loss 2.0000 (text 1.5000, audio 0.5000)  grad 1.25  lr 1.00e-03")
    assert "12.3k tokens/s" in line and "MFU 41.0%" in line and line.endswith("2 min left")


def test_the_progress_line_has_means_by_target_over_the_steps_since_the_last_line():
    progress = IntervalMetrics(("text_loss", "audio_loss"), {"text_loss": 1.0, "audio_loss": 2.0}, "tokens", None)
    steps = [
        entry(1, loss=2.5),
        entry(2, loss=1.5) | {"text_loss": 9.0, "text_count": 1.0, "audio_loss": 0.0, "audio_count": 0.0},
        entry(3, loss=float("nan")) | {"text_loss": float("nan"), "grad_norm": float("inf"), "skipped": 1.0},
    ]
    for step in steps:
        progress.add(measured(step), flops=0.0)
    # Text: 3 targets of 1.5 and 1 of 9; audio: only the first step has targets; the third was skipped.
    line = progress.line(steps[-1], 100)
    assert "loss 4.3750 (text 3.3750, audio 0.5000)  grad 1.25" in line
    progress.add(measured(steps[1]), flops=0.0)
    assert "loss 9.0000 (text 9.0000)" in progress.line(steps[1], 100)
    progress.add(measured(steps[2]), flops=0.0)
    assert "every update was skipped" in progress.line(steps[2], 100)


def test_losses_without_targets_are_left_out():
    found = measured(entry(1) | {"text_count": 0.0, "prior_loss": 0.0})
    assert "text_loss" not in found and found["audio_loss"] == 0.5 and found["prior_loss"] == 0.0


def test_sources_by_name():
    metrics = {
        "source_text_sum": np.asarray([4.0, 0.0]),
        "source_text_count": np.asarray([2.0, 0.0]),
        "source_audio_sum": np.asarray([9.0, 0.0]),
        "source_audio_count": np.asarray([3.0, 0.0]),
    }
    expected = {"a": {"text_loss": 2.0, "text_count": 2.0, "audio_loss": 3.0, "audio_count": 3.0}}
    assert by_source(metrics, ("a", "b")) == expected


def test_the_limit_depends_on_updates_up_to_the_second_before():
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


def test_the_guard_stops_after_consecutive_skips():
    assert Watch(Guard(action="stop")).add(1, math.inf, True)
    watch = Watch(Guard(max_consecutive_skips=2))
    assert watch.add(1, 1.0, True) is None and watch.add(2, 1.0, False) is None
    assert watch.add(3, 1.0, True) is None and "2 updates in a row" in watch.add(4, 1.0, True)


def test_tensorboard_receives_every_number(tmp_path):
    board_module = pytest.importorskip("tensorboardX")
    assert board_module
    board = Board(tmp_path, True, None, "run", {})
    board.write("train", entry(1) | {"sources": {"a": {"text_loss": 3.5}}})
    board.close()
    (written,) = (tmp_path / "tensorboard").iterdir()
    content = written.read_bytes()
    assert b"train/loss" in content and b"train/sources/a/text_loss" in content


def test_wandb_receives_every_number(tmp_path, monkeypatch):
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
    started, (step, numbers), ended = calls
    assert started == {"project": "project", "name": "run", "id": "run", "resume": "allow", "config": {"seed": 3}}
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


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (b'{"step": 1}\n{"step": 2', [1]),
        (b'\xff\n{"step": 1}\n' + b"[" * 1000 + b'\n{"step": ' + b"9" * 400 + b'}\n{"step": "2"}\n{"step": -1}\n', [1]),
        (b'{"step": 1, "name": "a\xc2\x85b\xe2\x80\xa8c"}\r\n[1]\nnull\n\n{"step": 2}\n', [1, 2]),
    ],
)
def test_damaged_lines_are_ignored(tmp_path, content, steps):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert [entry["step"] for entry in read_entries(tmp_path / "metrics.jsonl")] == steps


def test_a_plot_of_losses_that_are_not_finite(tmp_path):
    pytest.importorskip("matplotlib")
    from moss_jax.train.plot import plot_runs

    (tmp_path / "run.json").write_text('{"stage": [1], "name": {}}')
    lines = [{"step": 1, "text_loss": "abc"}, {"step": 2, "text_loss": [1]}, {"step": 3, "text_loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "evaluations.jsonl").write_text('{"step": 3, "text_loss": {}}\n')
    plot_runs([tmp_path], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size
    (tmp_path / "run.json").write_text('{"kind": []}')
    with pytest.raises(MossError, match=r"run\.json: kind is \[\], expected one of"):
        plot_runs([tmp_path], tmp_path / "loss.png")

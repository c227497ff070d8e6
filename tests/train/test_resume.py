"""What a run is worth after it was killed, moved to another mesh, or found its checkpoint damaged."""

import json
import shutil

import numpy as np
import pytest

from tests.train import kill, tiny


def losses(folder, first=1):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return np.asarray([[entry["loss"], entry["text_loss"], entry["audio_loss"]] for entry in entries[first - 1 :]])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("resume") / "data")


@pytest.mark.slow
def test_killed_runs_end_as_the_uninterrupted_one(tmp_path):
    result = kill.compare(tmp_path, times=2, seed=1)
    assert result["kills"] == 2 and result["in the middle of a save"] >= 1


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_losses(data, tmp_path):
    """8 devices with fsdp to step 10; then 20 more there, and on 4 devices with tensor parallelism."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    config = tiny.write_config(tmp_path / "run.py", data, folder)
    settings = ("save_every=10", "evaluate_every=0", "export_every=0", "held_out=none")
    assert tiny.run(config, "steps=10", *settings, devices=8).returncode == 0
    shutil.copytree(folder, moved)
    same = tiny.run(config, "steps=30", *settings, devices=8)
    other = tiny.run(
        config, "steps=30", f"folder={moved}", "mesh.fsdp=1", "mesh.tensor=4", *settings, devices=4
    )  # fmt: skip
    assert same.returncode == other.returncode == 0, other.stderr
    assert "mesh: fsdp 8" in same.stderr and "mesh: tensor 4" in other.stderr
    np.testing.assert_allclose(losses(moved, 11), losses(folder, 11), rtol=1e-5)
    assert losses(folder, 11).shape == (20, 3)

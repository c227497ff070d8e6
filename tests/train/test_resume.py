"""What a run is worth after it was killed, moved to another mesh, or spread over processes."""

import pytest

from tests.train import kill, places


@pytest.mark.slow
def test_killed_runs_end_like_the_uninterrupted_one(tmp_path):
    result = kill.compare(tmp_path, times=2, seed=1)
    assert result["kills"] == 2 and result["in the middle of a save"] >= 1


@pytest.mark.long
@pytest.mark.slow
def test_other_meshes_and_processes_give_the_same_losses(tmp_path):
    assert len(places.compare(tmp_path, steps=16, switch_at=4, compared=8)) == 4

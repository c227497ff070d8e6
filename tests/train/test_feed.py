"""Which rows a process reads, and that the devices get them."""

import jax
import numpy as np
import pytest

from moss_jax.data import open_batches
from moss_jax.sharding import make_mesh
from moss_jax.train import feed
from moss_jax.train.run_file import load_run
from moss_jax.train.speech_lm.feed import packed_feed
from tests.train import tiny


@pytest.mark.parametrize(
    "spans, rows, expected",
    [
        ([(0, 8)], 8, ([0], 1)),
        ([(4, 6), (6, 8)], 8, ([1], 2)),
        ([(4, 6), (4, 6)], 8, ([2], 4)),  # devices that divide the sequence hold the same rows
        ([(0, 2), (4, 6)], 8, ([0, 2], 4)),  # a mesh that does not follow the processes
        ([(1, 2), (2, 3)], 4, ([1, 2], 4)),
        ([(10, 20), (30, 40)], 160, ([1, 3], 16)),
        ([(0, 3), (6, 12)], 12, ([0, 2, 3], 4)),
    ],
)
def test_rows_are_divided_into_the_largest_blocks(spans, rows, expected):
    indices, count = feed.blocks(spans, rows)
    assert (indices, count) == expected
    size = rows // count
    held = {row for index in indices for row in range(index * size, (index + 1) * size)}
    assert held == {row for span in spans for row in range(*span)}


@pytest.mark.parametrize("count", [1, 4, 8])
def test_the_devices_receive_the_global_batch(tmp_path, monkeypatch, count):
    """However it is opened: as a whole or block by block."""
    data = tiny.write_data(tmp_path / "data")
    run = load_run(tiny.write_config(tmp_path / "run.py", data, tmp_path / "run"))
    expected = open_batches(run.data, tiny.MODEL, context=run.context, batch_size=run.batch_size)
    monkeypatch.setattr(feed, "blocks", lambda spans, rows: (list(range(count)), count))
    batches = packed_feed(run.data, tiny.MODEL, run, make_mesh(devices=jax.devices()[:1]))
    batches.skip_to(3)
    expected.skip_to(3)
    state = batches.get_state()
    for _ in range(2):
        for found, wanted in zip((next(batches), next(batches)), (next(expected), next(expected)), strict=True):
            assert set(found) == set(wanted)
            for name in wanted:
                np.testing.assert_array_equal(found[name], wanted[name])
        batches.set_state(state)
        expected.skip_to(3)
    batches.close()
    expected.close()

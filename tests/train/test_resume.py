"""What a run is worth after it was killed, moved to another mesh, or spread over processes."""

import json
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.train import kill, tiny

STEPS, MOVED_AT, COMPARED = 50, 10, 20

# `moss-jax train`, writing down which packed rows this process asks for.
RECORDING = """
import sys
from moss_jax.cli import main
from moss_jax.data.pipeline import PackedRows

read, rows = PackedRows.__getitem__, open(sys.argv.pop(1), "a")

def recorded(self, index):
    print(self.index, index, file=rows, flush=True)
    return read(self, index)

PackedRows.__getitem__ = recorded
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_runs_end_as_the_uninterrupted_one(tmp_path):
    result = kill.compare(tmp_path, times=2, seed=1)
    assert result["kills"] == 2 and result["in the middle of a save"] >= 1


class Place:
    """A folder with data and a config for each run in it."""

    def __init__(self, folder):
        self.folder, self.data = folder, tiny.write_data(folder / "data")

    def start(self, name, *settings, devices, flags=()):
        config = tiny.write_config(self.folder / f"{name}.py", self.data, self.folder / name)
        settings = (f"steps={STEPS}", "held_out=none", f"save_every={MOVED_AT}", "keep=9", "log_every=1", *settings)
        rows = self.folder / f"{name}.rows{flags[-1] if flags else ''}"
        return subprocess.Popen(
            [sys.executable, "-c", RECORDING, str(rows), *tiny.command(config, *settings, flags=flags)[3:]],
            env=tiny.environment(devices, MOSS_JAX_CACHE=str(self.folder / "cache")), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=tiny.ROOT,
        )  # fmt: skip

    def start_two(self, name):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            where = f"localhost:{probe.getsockname()[1]}"
        flags = "--distributed", "--coordinator", where, "--processes", "2", "--process"
        return [self.start(name, devices=4, flags=(*flags, str(i))) for i in range(2)]

    def losses(self, name):
        entries = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
        return np.asarray([[entry[key] for key in ("loss", "text_loss", "audio_loss")] for entry in entries])

    def rows(self, name):
        return {tuple(map(int, line.split())) for line in (self.folder / name).read_text().splitlines()}


def finish(*processes, code=0):
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(outputs)
    return outputs


@pytest.mark.slow
def test_other_meshes_and_processes_give_the_same_losses(tmp_path):
    """fsdp on 8 devices; from step 10 on, 4 devices with tensor parallelism; 2 processes of 4 devices each, which are
    asked to end once and go on."""
    place = Place(tmp_path)
    (told,) = finish(place.start("eight", devices=8))
    expected = place.losses("eight")
    assert "mesh: fsdp 8" in told and expected.shape == (STEPS, 3)

    shutil.copytree(tmp_path / "eight", tmp_path / "moved")
    for path in (tmp_path / "moved/checkpoints").iterdir():
        if path.name != str(MOVED_AT):
            shutil.rmtree(path)
    end = MOVED_AT + COMPARED
    (told,) = finish(place.start("moved", f"steps={end}", "mesh.fsdp=1", "mesh.tensor=4", devices=4))
    assert "mesh: tensor 4" in told and f"going on after step {MOVED_AT} of {end}" in told
    np.testing.assert_allclose(place.losses("moved")[MOVED_AT:], expected[MOVED_AT:end], rtol=1e-5)

    two = place.start_two("two")
    next(line for line in two[0].stdout if line.startswith("step 5/"))
    two[1].send_signal(signal.SIGTERM)  # the notice comes to one of them
    told, _ = finish(*two, code=75)
    saved = len(place.losses("two"))
    assert saved < STEPS and f"saved after step {saved};" in told
    told, _ = finish(*place.start_two("two"))
    assert f"going on after step {saved} of {STEPS}" in told
    np.testing.assert_allclose(place.losses("two"), expected, rtol=1e-5)

    everything, shares = place.rows("eight.rows"), [place.rows(f"two.rows{i}") for i in range(2)]
    assert not shares[0] & shares[1]
    assert all(0.4 * len(everything) < len(share) < 0.6 * len(everything) for share in shares)

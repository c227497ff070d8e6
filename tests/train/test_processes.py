"""Two processes of four CPU devices each, over jax.distributed on this machine."""

import json
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.train import tiny

# `moss-jax train`, writing down which packed rows this process asks for.
RECORDING = """
import sys
from moss_jax.cli import main
from moss_jax.data.pipeline import PackedRows

read, rows = PackedRows.__getitem__, open(sys.argv.pop(1), "a")

def recorded(self, index):
    print(self.seed, self.index, index, file=rows, flush=True)
    return read(self, index)

PackedRows.__getitem__ = recorded
sys.exit(main(sys.argv[1:]))
"""
STEPS = 50
SETTINGS = (f"steps={STEPS}", "optimizer.total_steps=60", "save_every=25", "evaluate_every=25")


def start(config, rows, *settings, process=None, port=None) -> subprocess.Popen:
    words = tiny.command(config, *settings)[3:]
    if process is not None:
        words += ["--distributed", "--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(process)]
    return subprocess.Popen(
        [sys.executable, "-c", RECORDING, str(rows), *words], env=tiny.environment(8 if process is None else 4),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tiny.ROOT,
    )  # fmt: skip


def start_two(config, folder, *settings):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [start(config, folder / f"rows{i}", *settings, process=i, port=port) for i in range(2)]


def entries(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def read_rows(path):
    return {tuple(map(int, line.split())) for line in path.read_text().splitlines()}


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_and_read_half_each(tmp_path):
    data = tiny.write_data(tmp_path / "data")
    one, two = tmp_path / "one", tmp_path / "two"
    configs = [tiny.write_config(tmp_path / f"{folder.name}.py", data, folder) for folder in (one, two)]
    alone = start(configs[0], tmp_path / "rows", *SETTINGS)
    assert alone.wait() == 0, alone.stdout.read()
    both = start_two(configs[1], tmp_path, *SETTINGS)
    for process in both:
        output = process.communicate()[0]
        assert process.returncode == 0, output
    for name, count in (("metrics.jsonl", STEPS), ("evaluations.jsonl", STEPS // 25)):
        expected, found = entries(one, name), entries(two, name)
        assert [e["step"] for e in found] == [e["step"] for e in expected] and len(found) == count
        for key in ("loss", "text_loss", "audio_loss"):
            np.testing.assert_allclose([e[key] for e in found], [e[key] for e in expected], rtol=1e-5)
    everything, shares = read_rows(tmp_path / "rows"), [read_rows(tmp_path / f"rows{i}") for i in range(2)]
    assert not shares[0] & shares[1]
    assert all(0.4 * len(everything) < len(share) < 0.6 * len(everything) for share in shares)
    weights = [(folder / f"exports/{STEPS}/transformer/model.safetensors").stat().st_size for folder in (one, two)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_notice_to_one_process_ends_both_after_the_same_step(tmp_path):
    data, folder = tiny.write_data(tmp_path / "data"), tmp_path / "run"
    config = tiny.write_config(tmp_path / "run.py", data, folder)
    settings = ("steps=100000", "save_every=100000", "evaluate_every=0", "held_out=none", "log_every=1")
    both = start_two(config, tmp_path, *settings)
    for line in both[0].stdout:
        if line.startswith("step 5/"):
            break
    both[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [75, 75], outputs
    (saved,) = [int(path.name) for path in (folder / "checkpoints").iterdir()]
    assert entries(folder)[-1]["step"] == saved
    assert f"saved after step {saved}" in outputs[0]

"""The same run on other meshes and over two processes, compared with 8 devices of one process.

    python -m tests.train.places

fsdp on 8 CPU devices; from step 10 on, 4 devices with tensor parallelism, for 20 steps; 2 processes of 4 devices each
over jax.distributed, ended by a SIGTERM to one of them and resumed, for 50 steps. Losses agree to 1e-5 relative; each
process reads half of the data.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.train import tiny

TOLERANCE = 1e-5

# `moss-jax train` that records which packed rows this process reads.
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


class Place:
    """A folder with data and with runs of `steps` steps, by name."""

    def __init__(self, folder: Path, steps: int, save_every: int):
        self.folder = folder
        self.data = tiny.write_data(folder / "data")
        self._settings = f"steps={steps}", f"save_every={save_every}", "held_out=none", "keep=9", "log_every=1"

    def start(self, name: str, *settings: str, devices: int, flags: tuple[str, ...] = ()) -> subprocess.Popen:
        config = tiny.write_config(self.folder / f"{name}.py", self.data, self.folder / name)
        settings = (*self._settings, *settings)
        rows = self.folder / f"{name}.rows{flags[-1] if flags else ''}"
        return subprocess.Popen(
            [sys.executable, "-c", RECORDING, str(rows), *tiny.command(config, *settings, flags=flags)[3:]],
            env=tiny.environment(devices, MOSS_JAX_CACHE=str(self.folder / "cache")),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tiny.ROOT,
        )

    def start_two(self, name: str) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            where = f"localhost:{probe.getsockname()[1]}"
        flags = "--distributed", "--coordinator", where, "--processes", "2", "--process"
        return [self.start(name, devices=4, flags=(*flags, str(i))) for i in range(2)]

    def losses(self, name: str) -> np.ndarray:
        """[steps, 3]: loss, text loss and audio loss of every step, none missing or repeated."""
        entries = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
        return np.asarray([[entry[key] for key in ("loss", "text_loss", "audio_loss")] for entry in entries])

    def rows(self, name: str) -> set[tuple[int, ...]]:
        return {tuple(map(int, line.split())) for line in (self.folder / name).read_text().splitlines()}


def compare(folder: Path, steps: int = 50, switch_at: int = 10, compared: int = 20) -> dict[str, str]:
    """Runs all comparisons and raises AssertionError on a difference. Returns {comparison: result as text}."""
    place = Place(folder, steps, switch_at)
    result = {}
    (output,) = finish(place.start("eight", devices=8))
    expected = place.losses("eight")
    assert "mesh: fsdp 8" in output and expected.shape == (steps, 3)

    shutil.copytree(folder / "eight", folder / "moved")
    for path in (folder / "moved/checkpoints").iterdir():
        if path.name != str(switch_at):
            shutil.rmtree(path)
    end = switch_at + compared
    (output,) = finish(place.start("moved", f"steps={end}", "mesh.fsdp=1", "mesh.tensor=4", devices=4))
    assert "mesh: tensor 4" in output and f"resuming after step {switch_at} of {end}" in output
    worst = difference(place.losses("moved")[switch_at:], expected[switch_at:end])
    result["8 devices, fsdp -> 4 devices, tensor"] = f"{compared} steps, largest relative difference {worst:.1e}"

    two = place.start_two("two")
    next(line for line in two[0].stdout if line.startswith("step 5/"))
    two[1].send_signal(signal.SIGTERM)  # the notice comes to one of them
    output, _ = finish(*two, code=75)
    saved = len(place.losses("two"))
    assert saved < steps and f"saved after step {saved};" in output
    result["SIGTERM to one of two processes"] = f"both ended with 75 after step {saved}"
    output, _ = finish(*place.start_two("two"))
    assert f"resuming after step {saved} of {steps}" in output
    worst = difference(place.losses("two"), expected)
    result["1 process of 8 devices -> 2 of 4"] = f"{steps} steps, largest relative difference {worst:.1e}"

    everything = place.rows("eight.rows")
    shares = [place.rows(f"two.rows{i}") for i in range(2)]
    assert not shares[0] & shares[1]
    assert all(0.4 * len(everything) < len(share) < 0.6 * len(everything) for share in shares)
    counts = " and ".join(str(len(share)) for share in shares)
    result["packed rows read"] = f"{len(everything)} by one process; {counts} by two, none by both"
    return result


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE)
    return float(np.max(np.abs(found - expected) / np.abs(expected)))


def finish(*processes: subprocess.Popen, code: int = 0) -> list[str]:
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(outputs)
    return outputs


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        for what, found in compare(Path(folder)).items():
            print(f"{what}: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

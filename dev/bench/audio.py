"""Reading and resampling 1 s of audio at usual and unusual sample rates: seconds, and peak memory in the note.

Each rate is measured in a separate process, so that its peak memory does not include that of another rate. The peer is
soxr if it is installed; it only resamples, so its seconds do not include reading the file.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from dev.bench import Options, Row
from moss_jax.errors import MossError

RATES = (8001, 22050, 22254, 44100, 44101, 47999, 48000, 96000, 192000, 655350)  # Hz
TO_RATE = 16000
# The first run is measured, as it is the cost of one recording of an unusual rate. Imports are not measured.
PROGRAM = """
import json, re, sys, time
from pathlib import Path
import scipy.signal, soundfile
from moss_jax.audio import load_audio, resample

path, to_rate, repeats, peer = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "peer"
def peak():
    # The peak of getrusage would include the memory of the parent process before exec.
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) / 1024 if status.exists() else float("nan")
before = peak()
ours, theirs = [], []
for _ in range(repeats):
    start = time.perf_counter()
    wave, rate = load_audio(path)
    resample(wave, rate, to_rate)
    ours.append(time.perf_counter() - start)
memory = peak() - before
if peer:
    import soxr
    for _ in range(repeats):
        start = time.perf_counter()
        soxr.resample(wave, rate, to_rate)
        theirs.append(time.perf_counter() - start)
print(json.dumps([ours, theirs, memory]))
"""


def run(options: Options) -> Iterator[Row]:
    """A row for each rate of RATES."""
    import soundfile

    peer = options.peer and find_spec("soxr") is not None
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            path = Path(folder) / f"{rate}.wav"
            soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, rate), rate, subtype="PCM_16")
            ours, theirs, memory = measure(path, options.repeats, peer)
            note = f"{memory:.0f} MiB of peak memory above the start"
            yield Row(f"1 s at {rate} Hz", ours, theirs, "soxr, resampling only" if peer else "", note)


def measure(path: Path, repeats: int, peer: bool) -> tuple[list[float], list[float], float]:
    """Measures in a fresh process: (seconds of our runs, of the peer's runs, MiB of peak memory above the start)."""
    command = [sys.executable, "-c", PROGRAM, str(path), str(TO_RATE), str(repeats), "peer" if peer else "alone"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise MossError(f"bench audio: {path.name} failed ({reason})")
    ours, theirs, memory = json.loads(done.stdout)
    return ours, theirs, memory

"""Kills a run at random moments, resumes it each time, and compares it with an uninterrupted run.

    python -m tests.train.kill --times 20

Every second kill waits for an unfinished checkpoint on disk, so that it interrupts a save. The losses,
the gradient norms and the exported weights must be the same to the last bit.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.train import tiny

SAME = ("step", "loss", "text_loss", "audio_loss", "grad_norm", "learning_rate", "skipped", "sources", "tokens")
SAVE_EVERY = 3
STEPS_A_KILL = 8  # steps of the run for each kill: more than a process completes before it is killed


def compare(folder: Path, times: int, seed: int = 0, say=print) -> dict[str, int]:
    """Runs both and raises AssertionError where they differ. Returns counts of the kinds of kills."""
    rng = random.Random(seed)
    steps = STEPS_A_KILL * (times + 1)
    data = tiny.write_data(folder / "data")
    configs = {name: tiny.write_config(folder / f"{name}.py", data, folder / name) for name in ("whole", "killed")}
    settings = (f"steps={steps}", f"save_every={SAVE_EVERY}", f"optimizer.total_steps={steps}", "evaluate_every=10")
    compiled = {"MOSS_JAX_CACHE": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    result = {"kills": 0, "in the middle of a save": 0, "before the first step": 0, "steps done twice": 0}

    def start(name: str) -> subprocess.Popen:
        log = (folder / f"{name}.log").open("a")
        return subprocess.Popen(
            tiny.command(configs[name], *settings),
            env=tiny.environment(**compiled),
            stdout=log,
            stderr=log,
            cwd=tiny.ROOT,
        )

    def finish(name: str) -> None:
        process = start(name)
        assert process.wait() == 0, (folder / f"{name}.log").read_text()[-3000:]

    finish("whole")
    say(f"uninterrupted: {steps} steps")
    while result["kills"] < times:
        process = start("killed")
        before = _steps(folder / "killed")
        in_save = _wait(process, folder / "killed", before, rng, aim_at_save=result["kills"] % 2 == 1)
        alive = process.poll() is None
        process.kill()
        code = process.wait()
        assert alive or code == 0, (folder / "killed.log").read_text()[-3000:]
        assert alive, "the run ended before it could be killed"
        after = _steps(folder / "killed")
        result["kills"] += 1
        result["in the middle of a save"] += in_save
        result["before the first step"] += after <= before
        whole = max((int(p.name) for p in (folder / "killed/checkpoints").glob("*") if p.name.isdigit()), default=0)
        result["steps done twice"] += max(after - whole, 0)
        say(f"kill {result['kills']}: after step {after}, checkpoint {whole}{', in a save' if in_save else ''}")
    finish("killed")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        whole, killed = (_entries(folder / run / name) for run in ("whole", "killed"))
        assert [entry["step"] for entry in killed] == [entry["step"] for entry in whole], name
        for one, other in zip(whole, killed, strict=True):
            assert {k: one.get(k) for k in SAME} == {k: other.get(k) for k in SAME}, f"{name}: {one}\n{other}"
    weights = [folder / name / f"exports/{steps}/transformer/model.safetensors" for name in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes(), "exported weights differ"
    return result | {"steps": steps, "steps compared": len(_entries(folder / "whole/metrics.jsonl"))}


def _wait(process: subprocess.Popen, folder: Path, before: int, rng: random.Random, aim_at_save: bool) -> bool:
    """Waits until the moment to kill. Returns whether a save is unfinished then."""
    new_steps = rng.randint(0, STEPS_A_KILL - SAVE_EVERY - 1)
    if new_steps == 0 and not aim_at_save:
        time.sleep(rng.uniform(0, 6))
        return _saving(folder)
    while process.poll() is None:
        if aim_at_save:
            if _steps(folder) > before and _saving(folder):
                time.sleep(rng.uniform(0, 0.01))
                return _saving(folder)
        elif _steps(folder) >= before + new_steps:
            time.sleep(rng.uniform(0, 0.1))
            return _saving(folder)
        time.sleep(0.001)
    return False


def _saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def _steps(folder: Path) -> int:
    entries = _entries(folder / "metrics.jsonl")
    return entries[-1]["step"] if entries else 0


def _entries(path: Path) -> list[dict]:
    try:
        lines = path.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), args.times, args.seed)
    for what, count in result.items():
        print(f"{what}: {count}")
    print("the losses, evaluations and exported weights are the same, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())

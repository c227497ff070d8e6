"""Report on a miniature run: python launch/miniature_report.py miniature

Prints whether the Qwen3 tensors are unchanged after stage 1, and the held-out loss of text before and after
stage 1, frozen and not. Exit code 1 if a byte changed.
"""

import json
import sys
from pathlib import Path

import numpy as np

from moss_jax.checkpoint import open_tensors


def main(folder: Path) -> int:
    before = open_tensors(folder / "qwen3")
    after = open_tensors(folder / "qwen3-after-stage1")
    same = [
        name
        for name in before.tensors
        if name in after.tensors and np.array_equal(_bytes(before.read(name)), _bytes(after.read(name)))
    ]
    print(f"stage 1: {len(same)} of {len(before.tensors)} tensors of the Qwen3 are the same, byte for byte")
    print("\n| run | held-out loss of text |\n| --- | --- |")
    for name, label in (
        ("text", "the Qwen3, before"),
        ("stage1", "after stage 1, frozen"),
        ("unfrozen", "the same steps, not frozen"),
        ("stage2", "after stage 2, with text in the mixture"),
    ):
        lines = (folder / "runs" / name / "evaluations.jsonl").read_text().splitlines()
        print(f"| {label} | {json.loads(lines[-1])['text_loss']:.4f} |")
    return int(set(same) != set(before.tensors) or set(before.tensors) != set(after.tensors))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

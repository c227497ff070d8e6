"""What is written beside the arrays of a checkpoint, and whether a run may go on from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moss_jax.errors import MossError
from moss_jax.progress import Say


def check_record(found: Mapping[str, Any], expected: Mapping[str, Any], where: Path, say: Say) -> None:
    """Raises MossError when a checkpoint is of another architecture, stage or whatever else `expected` has (a
    `Task.described` and the `fingerprint` of the frozen parameters); says when frozen weights are others."""
    for part, want in expected.items():
        if part == "frozen":
            continue
        have = found.get(part) or {}
        names = [name for name in want if have.get(name) != want[name] and not name.endswith("_weight")]
        if names:
            differs = [f"{name} is {have.get(name)!r}, this run's is {want[name]!r}" for name in names]
            told = f"{where}: of another {part} ({differs[0]}); give the run another folder, or the same {part}"
            raise MossError("\n  ".join([told, *differs[1:]]))
    if found.get("frozen") != expected["frozen"]:
        say(f"note: {where} was trained beside other frozen weights: init, or how they are held, is not what it was")

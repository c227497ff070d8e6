"""The record of a checkpoint: the JSON next to its arrays, which says whether a run may resume from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moss_jax.errors import MossError
from moss_jax.progress import Say


def check_record(found: Mapping[str, Any], expected: Mapping[str, Any], path: Path, say: Say) -> None:
    """Checks whether a run may resume from a checkpoint, and reports when its frozen weights were different.

    Args:
        found: the record of the checkpoint.
        expected: `Task.compatibility` of the run, and the `fingerprint` of its frozen parameters under "frozen".
        path: of the checkpoint.

    Raises:
        MossError: the architecture, stage or another part of `expected` differs.
    """
    for part, values in expected.items():
        if part == "frozen":
            continue
        saved = found.get(part) or {}
        names = [name for name in values if saved.get(name) != values[name] and not name.endswith("_weight")]
        if names:
            differences = [f"{name} is {saved.get(name)!r}, this run's is {values[name]!r}" for name in names]
            summary = f"{path}: of another {part} ({differences[0]}); give the run another folder, or the same {part}"
            raise MossError("\n  ".join([summary, *differences[1:]]))
    if found.get("frozen") != expected["frozen"]:
        say(f"note: {path} was trained with other frozen weights: `init` has changed, or the dtype of what is frozen")

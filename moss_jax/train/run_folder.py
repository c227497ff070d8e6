"""The folder of a run: names of its parts, and the export that a later run starts from."""

from pathlib import Path

from moss_jax.errors import MossError

RUN_FILE = "run.json"
EXPORTS = "exports"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"


def newest_export(folder: str | Path) -> Path:
    """The export of a run with the largest step. Raises MossError when the run has none."""
    exports = [path for path in (Path(folder) / EXPORTS).glob("*") if path.name.isdigit()]
    if not exports:
        raise MossError(f"{folder}: this run has no export yet; moss-jax export {folder} -o SYSTEM makes one")
    return max(exports, key=lambda path: int(path.name))


def resolve_init(init: str) -> str:
    """What `init` of a run refers to: the newest export when it is the folder of an earlier run, else itself."""
    return str(newest_export(init)) if (Path(init) / RUN_FILE).is_file() else init

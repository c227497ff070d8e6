"""Loss curves of runs as a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.errors import MossError
from moss_jax.files import atomic_file
from moss_jax.train.metrics import read_entries
from moss_jax.train.run_file import read_run_values
from moss_jax.train.run_folder import EVALUATIONS_FILE, METRICS_FILE
from moss_jax.train.tasks import run_class

FORMATS = (".png", ".svg", ".pdf")
WINDOWS = 50  # the bold line is a moving average over a window of 1 / WINDOWS of the steps


@dataclass(frozen=True)
class _Curves:
    """What is drawn of one run: its JSON, and the entries of metrics.jsonl and evaluations.jsonl."""

    values: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def plot_runs(folders: Sequence[str | Path], output: str | Path) -> None:
    """Draws the reported losses of runs (text and audio of a language model) over the steps, one column per run, with
    held-out losses as points.

    Raises:
        MossError: a folder is not that of a run, or has no metrics; the output has another ending or cannot be written.
    """
    output = Path(output)
    if output.suffix not in FORMATS:
        raise MossError(f"{output}: ends in {output.suffix!r}, expected one of {', '.join(FORMATS)}")
    runs = [_read_curves(Path(folder)) for folder in folders]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(1 + 4.5 * len(runs), 4), squeeze=False, sharey=True)
    kinds = {run.values["kind"]: run_class(run.values["kind"]) for run in runs}
    for axis, run in zip(axes[0], runs, strict=True):
        losses = [name for name in kinds[run.values["kind"]].reported_metrics if name.endswith("_loss")]
        for index, name in enumerate(losses):
            _draw(axis, run, name.removesuffix("_loss"), f"C{index}")
        axis.set(title=_title(run.values), xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss, nats per token" if set(kinds) == {"language_model"} else "loss")
    lines = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0][0].legend(lines.values(), lines.keys())
    figure.tight_layout()
    with atomic_file(output) as part:
        figure.savefig(part, format=output.suffix[1:], dpi=150)
    pyplot.close(figure)


def _read_curves(folder: Path) -> _Curves:
    values = read_run_values(folder)
    steps = read_entries(folder / METRICS_FILE)
    if not steps:
        raise MossError(f"{folder / METRICS_FILE}: no step in it yet")
    evaluations = folder / EVALUATIONS_FILE
    return _Curves(values, steps, read_entries(evaluations) if evaluations.is_file() else [])


def _draw(axis: Any, run: _Curves, target: str, color: str) -> None:
    points = [(entry["step"], _loss(entry, target)) for entry in run.steps if _has_loss(entry, target)]
    if not points:
        return
    x, y = np.asarray(points).T
    axis.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
    width = max(1, len(y) // WINDOWS)
    smooth = np.convolve(y, np.ones(width) / width, "valid")
    axis.plot(x[width - 1 :], smooth, color=color, label=target)
    points = [(entry["step"], _loss(entry, target)) for entry in run.evaluations if entry.get(f"{target}_loss")]
    if points:
        axis.plot(*np.asarray(points).T, "o", color=color, markersize=4, label=f"{target}, held out")


def _loss(entry: dict[str, Any], target: str) -> float:
    """The loss of an entry; NaN, which is not drawn, where the entry has no number."""
    try:
        return float(entry[f"{target}_loss"])
    except (KeyError, TypeError, ValueError):
        return math.nan


def _has_loss(entry: dict[str, Any], target: str) -> bool:
    """Whether a step has this loss: a batch of a language model may have had no target of this kind."""
    return bool(entry.get(f"{target}_count", f"{target}_loss" in entry))


def _title(values: dict[str, Any]) -> str:
    stage = values["stage"].get("name") if isinstance(values.get("stage"), dict) else None
    return f"{values.get('name')} ({stage})" if stage else f"{values.get('name')}"

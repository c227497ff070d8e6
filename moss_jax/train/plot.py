"""Loss curves of runs as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.checkpoint import atomic_file
from moss_jax.errors import MossError
from moss_jax.train.metrics import EVALUATIONS_FILE, METRICS_FILE, read_entries
from moss_jax.train.run import run_class, values_in

FORMATS = (".png", ".svg", ".pdf")
SMOOTH = 50  # the bold line is a mean over a window of 1 / SMOOTH of the steps


def plot_runs(folders: Sequence[str | Path], output: str | Path) -> None:
    """Draws the losses that a run shows (text and audio of a language model) over the steps, a column a run, held-out
    losses as points.

    Raises:
        MossError: a folder is not that of a run, or has no metrics; the output has another ending or cannot be written.
    """
    output = Path(output)
    if output.suffix not in FORMATS:
        raise MossError(f"{output}: ends in {output.suffix!r}, expected one of {', '.join(FORMATS)}")
    runs = [
        (values_in(folder), read_entries(Path(folder) / METRICS_FILE), _held_out(Path(folder)))
        for folder in map(Path, folders)
    ]
    for folder, (_, steps, _) in zip(folders, runs, strict=True):
        if not steps:
            raise MossError(f"{Path(folder) / METRICS_FILE}: no step in it yet")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(1 + 4.5 * len(runs), 4), squeeze=False, sharey=True)
    kinds = {values["kind"]: run_class(values["kind"]) for values, _, _ in runs}
    for axis, (values, steps, held_out) in zip(axes[0], runs, strict=True):
        shown = [name for name in kinds[values["kind"]].shown if name.endswith("_loss")]
        for place, name in enumerate(shown):
            _draw(axis, steps, held_out, name.removesuffix("_loss"), f"C{place}")
        axis.set(title=_title(values), xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss, nats per token" if set(kinds) == {"language_model"} else "loss")
    named = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0][0].legend(named.values(), named.keys())
    figure.tight_layout()
    with atomic_file(output) as part:
        figure.savefig(part, format=output.suffix[1:], dpi=150)
    pyplot.close(figure)


def _draw(axis: Any, steps: list[dict], held_out: list[dict], channel: str, color: str) -> None:
    points = [(entry["step"], _loss(entry, channel)) for entry in steps if _counts(entry, channel)]
    if not points:
        return
    x, y = np.asarray(points).T
    axis.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
    width = max(1, len(y) // SMOOTH)
    smooth = np.convolve(y, np.ones(width) / width, "valid")
    axis.plot(x[width - 1 :], smooth, color=color, label=channel)
    points = [(entry["step"], _loss(entry, channel)) for entry in held_out if entry.get(f"{channel}_loss")]
    if points:
        axis.plot(*np.asarray(points).T, "o", color=color, markersize=4, label=f"{channel}, held out")


def _loss(entry: dict, channel: str) -> float:
    """The loss of an entry; NaN, which is not drawn, where the entry holds no number."""
    try:
        return float(entry.get(f"{channel}_loss"))
    except (TypeError, ValueError):
        return math.nan


def _counts(entry: dict, channel: str) -> bool:
    """Whether a step has this loss: a language model's may have had no target of the channel."""
    return bool(entry.get(f"{channel}_count", f"{channel}_loss" in entry))


def _title(values: dict[str, Any]) -> str:
    stage = values["stage"].get("name") if isinstance(values.get("stage"), dict) else None
    return f"{values.get('name')} ({stage})" if stage else f"{values.get('name')}"


def _held_out(folder: Path) -> list[dict]:
    path = folder / EVALUATIONS_FILE
    return read_entries(path) if path.is_file() else []

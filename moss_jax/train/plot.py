"""Loss curves of runs as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.checkpoint import atomic_file
from moss_jax.errors import MossError
from moss_jax.nn.config import read_json
from moss_jax.train.losses import CHANNELS
from moss_jax.train.metrics import EVALUATIONS_FILE, METRICS_FILE, read_entries
from moss_jax.train.run import RUN_FILE

FORMATS = (".png", ".svg", ".pdf")
SMOOTH = 50  # the bold line is a mean over a window of 1 / SMOOTH of the steps


def plot_runs(folders: Sequence[str | Path], output: str | Path) -> None:
    """Draws text and audio loss over the steps, a column a run, held-out losses as points.

    Raises:
        MossError: a folder is not that of a run, or has no metrics; the output has another ending or cannot be written.
    """
    output = Path(output)
    if output.suffix not in FORMATS:
        raise MossError(f"{output}: ends in {output.suffix!r}, expected one of {', '.join(FORMATS)}")
    runs = [
        (_titled(Path(folder)), read_entries(Path(folder) / METRICS_FILE), _held_out(Path(folder)))
        for folder in folders
    ]
    for folder, (_, steps, _) in zip(folders, runs, strict=True):
        if not steps:
            raise MossError(f"{Path(folder) / METRICS_FILE}: no step in it yet")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(1 + 4.5 * len(runs), 4), squeeze=False, sharey=True)
    for axis, (title, steps, held_out) in zip(axes[0], runs, strict=True):
        for channel, color in zip(CHANNELS, ("tab:blue", "tab:orange"), strict=True):
            _draw(axis, steps, held_out, channel, color)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss, nats per token")
    named = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0][0].legend(named.values(), named.keys())
    figure.tight_layout()
    with atomic_file(output) as part:
        figure.savefig(part, format=output.suffix[1:], dpi=150)
    pyplot.close(figure)


def _draw(axis: Any, steps: list[dict], held_out: list[dict], channel: str, color: str) -> None:
    points = [(entry["step"], float(entry[f"{channel}_loss"])) for entry in steps if entry.get(f"{channel}_count")]
    if not points:
        return
    x, y = np.asarray(points).T
    axis.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
    width = max(1, len(y) // SMOOTH)
    smooth = np.convolve(y, np.ones(width) / width, "valid")
    axis.plot(x[width - 1 :], smooth, color=color, label=channel)
    points = [(entry["step"], entry[f"{channel}_loss"]) for entry in held_out if entry[f"{channel}_loss"]]
    if points:
        axis.plot(*np.asarray(points).T, "o", color=color, markersize=4, label=f"{channel}, held out")


def _titled(folder: Path) -> str:
    path = folder / RUN_FILE
    if not path.is_file():
        raise MossError(f"{folder}: no {RUN_FILE} in it, expected the folder of a run")
    run = read_json(path)
    return f"{run.get('name')} ({(run.get('stage') or {}).get('name')})"


def _held_out(folder: Path) -> list[dict]:
    path = folder / EVALUATIONS_FILE
    return read_entries(path) if path.is_file() else []

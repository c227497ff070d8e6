"""The pictures of the layer-similarity analysis."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moss_jax.evaluate.similarity import CENTRES, SCORES, Curves

COLOURS = {"shared": "tab:blue", "text": "tab:green", "audio": "tab:red"}
CONTROLS = ("tab:gray", "tab:brown", "tab:olive")
TITLES = {"match": "best speech position", "path": "best monotone path"}
CENTRE_TITLES = {"raw": "raw", "centred": "mean subtracted"}
SHOWN = 6  # layers in a heatmap


def plot_curves(everything: Sequence[Curves], path: str | Path) -> None:
    """One picture: scores and floors, and effects, by layer; band: one standard deviation over sentences. The first
    model is the subject, the others are controls and shown as effects."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    subject = everything[0]
    controls = everything[1:]
    split = subject.split()
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 4, sharex=True)
    for row, centre in enumerate(CENTRES):
        for column, score in enumerate(SCORES):
            levels = axes[row, 2 * column]
            effects = axes[row, 2 * column + 1]
            for block in subject.blocks:
                colour = COLOURS[block]
                name = block if block == "shared" else f"{block} branch"
                own, floor = (_joined(kind, block, centre, score) for kind in (subject.scores, subject.floors))
                _curve(levels, *own, colour, f"{name}: own text")
                _curve(levels, *floor, colour, f"{name}: other text", ":")
                _curve(effects, own[0], own[1] - floor[1], colour, name)
            for colour, control in zip(CONTROLS, controls, strict=False):
                for block in control.blocks:
                    label = control.name if block == control.blocks[0] else None
                    style = "--" if block != "audio" else "-."
                    own, floor = (_joined(kind, block, centre, score) for kind in (control.scores, control.floors))
                    _curve(effects, own[0], own[1] - floor[1], colour, label, style)
            for axis in (levels, effects):
                if split:
                    axis.axvline(split[0] + 0.5, color="black", linewidth=0.8, linestyle="--", alpha=0.6)
                axis.grid(alpha=0.25)
            levels.set_title(f"{TITLES[score]}, {CENTRE_TITLES[centre]}", fontsize=9)
            effects.set_title("above the floor", fontsize=9)
            effects.axhline(0, color="black", linewidth=0.6)
            levels.set_ylabel("cosine")
    for axis in axes[-1]:
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].legend(fontsize=7)
    axes[0, 1].legend(fontsize=7)
    count = subject.depth().shape[1]
    told = f"{subject.verdict()}{' (dashed)' if split else ''}"
    figure.suptitle(f"{subject.name}: speech against text, {count} sentences. {told}", fontsize=11)
    figure.savefig(path, dpi=130)


def plot_heatmaps(blocks: Mapping[str, np.ndarray], name: str, path: str | Path) -> None:
    """Cosines (speech positions x text positions) of one sentence at some layers of each block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(SHOWN, max(map(len, blocks.values())))
    figure = Figure(figsize=(2.2 * columns + 1, 2.4 * len(blocks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(blocks), columns, squeeze=False)
    shared = len(blocks.get("shared", ()))
    for row, (block, maps) in enumerate(blocks.items()):
        shown = np.unique(np.linspace(0, len(maps) - 1, min(SHOWN, len(maps))).round().astype(int))
        for column, axis in enumerate(axes[row]):
            if column >= len(shown):
                axis.set_axis_off()
                continue
            layer = shown[column]
            image = axis.imshow(maps[layer].T, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-1, vmax=1)
            axis.set_title(f"{block} {layer + 1 + (shared if block != 'shared' else 0)}", fontsize=8)
            axis.tick_params(labelsize=6)
        axes[row, 0].set_ylabel("text position", fontsize=8)
    figure.supxlabel("speech position (codes)", fontsize=8)
    figure.suptitle(f"{name}: cosine, mean subtracted", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7)
    figure.savefig(path, dpi=130)


def _joined(scores: Mapping, block: str, centre: str, score: str) -> tuple[np.ndarray, np.ndarray]:
    """(layers counted from 1, values [layers, sentences]) of a block; a branch begins at the last shared layer."""
    own = scores[block, centre, score]
    shared = scores.get(("shared", centre, score))
    if block == "shared" or shared is None:
        return np.arange(1, len(own) + 1), own
    return np.arange(len(shared), len(shared) + len(own) + 1), np.concatenate([shared[-1:], own])


def _curve(axis, place: np.ndarray, values: np.ndarray, colour: str, label: str | None, style: str = "-") -> None:
    mean = values.mean(1)
    spread = values.std(1)
    marker = "o" if len(place) < 2 else None  # a line of one point would not show
    axis.plot(place, mean, color=colour, linestyle=style, label=label, marker=marker, markersize=3, linewidth=1.4)
    axis.fill_between(place, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)

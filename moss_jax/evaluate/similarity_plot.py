"""Figures of the layer-similarity analysis."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moss_jax.evaluate.curves import CENTRES, SCORES, Curves, Key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"shared": "tab:blue", "text": "tab:green", "audio": "tab:red"}
CONTROLS = ("tab:gray", "tab:brown", "tab:olive")
TITLES = {"match": "best speech position", "path": "best monotone path"}
CENTRE_TITLES = {"raw": "raw", "centred": "mean subtracted"}
MAX_HEATMAP_LAYERS = 6  # more columns would be too small to read


def plot_curves(results: Sequence[Curves], path: str | Path) -> None:
    """One figure with scores, floors and effects by layer; the band is one standard deviation over sentences.

    The first model is the subject; the others are controls, of which only the effects are drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    subject = results[0]
    controls = results[1:]
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
                layers, scores = _with_last_shared(subject.scores, block, centre, score)
                _, floors = _with_last_shared(subject.floors, block, centre, score)
                _curve(levels, layers, scores, colour, f"{name}: own text")
                _curve(levels, layers, floors, colour, f"{name}: other text", ":")
                _curve(effects, layers, scores - floors, colour, name)
            for colour, control in zip(CONTROLS, controls, strict=False):
                for block in control.blocks:
                    label = control.name if block == control.blocks[0] else None
                    style = "--" if block != "audio" else "-."
                    layers, scores = _with_last_shared(control.scores, block, centre, score)
                    _, floors = _with_last_shared(control.floors, block, centre, score)
                    _curve(effects, layers, scores - floors, colour, label, style)
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
    verdict = f"{subject.verdict()}{' (dashed)' if split else ''}"
    figure.suptitle(f"{subject.name}: speech against text, {count} sentences. {verdict}", fontsize=11)
    figure.savefig(path, dpi=130)


def plot_heatmaps(blocks: Mapping[str, np.ndarray], name: str, path: str | Path) -> None:
    """Cosines (speech positions x text positions) of one sentence at some layers of each block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(MAX_HEATMAP_LAYERS, max(map(len, blocks.values())))
    figure = Figure(figsize=(2.2 * columns + 1, 2.4 * len(blocks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(blocks), columns, squeeze=False)
    shared = len(blocks.get("shared", ()))
    for row, (block, maps) in enumerate(blocks.items()):
        layers = np.unique(np.linspace(0, len(maps) - 1, min(MAX_HEATMAP_LAYERS, len(maps))).round().astype(int))
        for column, axis in enumerate(axes[row]):
            if column >= len(layers):
                axis.set_axis_off()
                continue
            layer = layers[column]
            image = axis.imshow(maps[layer].T, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-1, vmax=1)
            axis.set_title(f"{block} {layer + 1 + (shared if block != 'shared' else 0)}", fontsize=8)
            axis.tick_params(labelsize=6)
        axes[row, 0].set_ylabel("text position", fontsize=8)
    figure.supxlabel("speech position (codes)", fontsize=8)
    figure.suptitle(f"{name}: cosine, mean subtracted", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7)
    figure.savefig(path, dpi=130)


def _with_last_shared(
    scores: Mapping[Key, np.ndarray], block: str, centre: str, score: str
) -> tuple[np.ndarray, np.ndarray]:
    """(layers counted from 1, values [layers, sentences]) of a block; a branch begins at the last shared layer."""
    values = scores[block, centre, score]
    shared = scores.get(("shared", centre, score))
    if block == "shared" or shared is None:
        return np.arange(1, len(values) + 1), values
    return np.arange(len(shared), len(shared) + len(values) + 1), np.concatenate([shared[-1:], values])


def _curve(
    axis: "Axes", layers: np.ndarray, values: np.ndarray, colour: str, label: str | None, style: str = "-"
) -> None:
    mean = values.mean(1)
    spread = values.std(1)
    marker = "o" if len(layers) < 2 else None  # a line of one point would not be visible
    axis.plot(layers, mean, color=colour, linestyle=style, label=label, marker=marker, markersize=3, linewidth=1.4)
    axis.fill_between(layers, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)

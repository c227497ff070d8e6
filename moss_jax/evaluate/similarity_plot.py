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

    subject, controls = everything[0], everything[1:]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 4, sharex=True)
    for row, centre in enumerate(CENTRES):
        for column, score in enumerate(SCORES):
            levels, effects = axes[row, 2 * column], axes[row, 2 * column + 1]
            for block in subject.blocks:
                place, colour = _layers(subject, block), COLOURS[block]
                own = subject.scores[block, centre, score]
                _curve(levels, place, own, colour, f"{block}: own text")
                _curve(levels, place, subject.floors[block, centre, score], colour, f"{block}: other text", ":")
                _curve(effects, place, subject.effect(block, centre, score), colour, block)
            for colour, control in zip(CONTROLS, controls, strict=False):
                for block in control.blocks:
                    label = control.name if block == control.blocks[0] else None
                    style = "--" if block != "audio" else "-."
                    _curve(effects, _layers(control, block), control.effect(block, centre, score), colour, label, style)
            after, _ = subject.split()
            for axis in (levels, effects):
                axis.axvline(after + 0.5, color="black", linewidth=0.8, linestyle="--", alpha=0.6)
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
    after, above = subject.split()
    count = subject.scores[subject.blocks[0], *CENTRES[:1], SCORES[0]].shape[1]
    figure.suptitle(
        f"{subject.name}: speech against text, {count} sentences. "
        f"Dashed: the plateau ends after layer {after} ({above} above it)", fontsize=11,
    )  # fmt: skip
    figure.savefig(path, dpi=130)


def plot_heatmaps(blocks: Mapping[str, np.ndarray], name: str, path: str | Path) -> None:
    """Cosines (speech positions x text positions) of one sentence at some layers of each block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * SHOWN, 2.4 * len(blocks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(blocks), SHOWN, squeeze=False)
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


def _layers(curves: Curves, block: str) -> np.ndarray:
    shared = len(curves.scores["shared", *CENTRES[:1], SCORES[0]]) if "shared" in curves.blocks else 0
    count = len(curves.scores[block, CENTRES[0], SCORES[0]])
    return np.arange(count) + 1 + (0 if block == "shared" else shared)


def _curve(axis, place: np.ndarray, values: np.ndarray, colour: str, label: str | None, style: str = "-") -> None:
    mean, spread = values.mean(1), values.std(1)
    marker = "o" if len(place) < 3 else None
    axis.plot(place, mean, color=colour, linestyle=style, label=label, marker=marker, markersize=3, linewidth=1.4)
    axis.fill_between(place, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)

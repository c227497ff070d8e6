"""Where speech and text look alike inside the model, layer by layer, and so where to split it.

The same sentence passes the model once as speech and once as text. After each layer the rows that hold codes are
compared with the rows that hold text: cosines, raw and with the layer's mean taken off (raw ones are inflated by a few
large dimensions). Two scores: the mean over text positions of the best speech position, and the mean along the best
monotone path, which respects order. The floor is the same with text of other sentences, as many ids of it, since the
scores depend on the lengths; the effect is what is above the floor.

Left out are the markers (sosp, eosp), and the first position of each run. The mean of a layer is over the sentences at
hand, speech and text weighing the same. Curves: the shared layers, then each branch. Source: the analysis of arXiv
2510.00499; its formula is not known, this one is the project's.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.checkpoint import atomic_folder
from moss_jax.dialogue.grid import speech_rows, text_rows
from moss_jax.errors import MossError
from moss_jax.evaluate.alignment import best_match, best_path, cosines
from moss_jax.evaluate.items import Sentence, read_sentences
from moss_jax.evaluate.scoring import Scorer, padded_length
from moss_jax.nn.rope import rope_angles
from moss_jax.speech_lm import LayerSplitModel, SpeechLMConfig
from moss_jax.speech_lm.model import Layer

BLOCKS = ("shared", "text", "audio")
SCORES = ("match", "path")  # best speech position; best monotone path
CENTRES = ("raw", "centred")
PLATEAU = 0.9  # of the highest effect: the last layer above it is where the plateau ends


@partial(jax.jit, static_argnames="config")
def layer_outputs(params: Any, grid: jax.Array, *, config: SpeechLMConfig) -> dict[str, jax.Array]:
    """The residual stream after every layer.

    Args:
        params: nested.
        grid: int32 [B, T, 2], padded on the right.

    Returns:
        {"shared", "text", "audio"}, those that have layers: [L, B, T, D] in the config's dtype.
    """
    x = LayerSplitModel(config).apply({"params": params}, grid, method="embed")
    positions = jnp.broadcast_to(jnp.arange(grid.shape[1]), grid.shape[:2])
    angles = rope_angles(positions, config.head_dim, config.rope_theta)

    def layer(x, own):
        y, _ = Layer(config).apply({"params": own}, x, angles, None, None, None)
        return y, y

    outputs = {}
    if config.num_shared_layers:
        x, outputs["shared"] = jax.lax.scan(layer, x, params["shared"]["layers"])
    for branch in ("text", "audio") if config.num_modality_layers else ():
        _, outputs[branch] = jax.lax.scan(layer, x, params[branch]["layers"])
    return outputs


@jax.jit
def _sums(outputs, counts):
    """Sum over the counted rows (from row 1 on): outputs [L, B, T, D], counts [B] -> float32 [L, D]."""
    rows = jnp.arange(outputs.shape[2])
    counted = (rows >= 1) & (rows <= counts[:, None])
    return jnp.einsum("LBTD,BT->LD", outputs, counted, preferred_element_type=jnp.float32)


@jax.jit
def _compare(speech, text, speech_counts, text_counts, mean):
    """Scores of one sentence a row: speech [L, B, S, D], text [L, B, T, D], mean [L, D] -> ({score: [L, B]}, cosines
    [L, B, S - 1, T - 1]). A mean of zeros compares them raw."""

    def one_layer(s, t, m):
        c = cosines(s[:, 1:].astype(jnp.float32) - m, t[:, 1:].astype(jnp.float32) - m)
        scores = (jax.vmap(score)(c, speech_counts, text_counts) for score in (best_match, best_path))
        return dict(zip(SCORES, scores, strict=True)), c

    return jax.lax.map(lambda layer: one_layer(*layer), (speech, text, mean))


@dataclass(frozen=True, eq=False)
class Curves:
    """What one model shows.

    Attributes:
        name: of the model.
        scores: {(block, centre, score): float32 [layers of the block, sentences]} of each sentence with its own text.
        floors: the same with as much text of other sentences.
        heatmaps: {sentence's name: {block: float32 [L, codes, text positions]}}, centred, of those that were asked for.
    """

    name: str
    scores: dict[tuple[str, str, str], np.ndarray]
    floors: dict[tuple[str, str, str], np.ndarray]
    heatmaps: dict[str, dict[str, np.ndarray]]

    @property
    def blocks(self) -> list[str]:
        return list(dict.fromkeys(block for block, _, _ in self.scores))

    def effect(self, block: str, centre: str, score: str) -> np.ndarray:
        """Score above the floor, [layers, sentences]."""
        key = (block, centre, score)
        return self.scores[key] - self.floors[key]

    def depth(self) -> np.ndarray:
        """The centred path effect over the whole depth, [layers, sentences]: shared layers, then the branches' mean."""
        effects = {block: self.effect(block, "centred", "path") for block in self.blocks}
        if "text" not in effects:
            return effects["shared"]
        branches = (effects["text"] + effects["audio"]) / 2
        return np.concatenate([effects["shared"], branches]) if "shared" in effects else branches

    def split(self) -> tuple[int, int] | None:
        """(layer after which the plateau ends, counted from 1; layers above it): a rule of thumb for the split.

        None where the highest effect does not stand out (it is below two standard errors over sentences), or does not
        fall again.
        """
        means = self.depth().mean(1)
        last = int(np.flatnonzero(means >= PLATEAU * means.max())[-1]) if self.stands_out() else len(means) - 1
        return (last + 1, len(means) - 1 - last) if last < len(means) - 1 else None

    def stands_out(self) -> bool:
        """Whether the highest effect is above two standard errors over sentences."""
        effect = self.depth()
        best = effect[int(effect.mean(1).argmax())]
        return bool(best.mean() > 2 * best.std(ddof=1) / np.sqrt(len(best)))

    def verdict(self) -> str:
        """What `split` says, in a sentence."""
        if not self.stands_out():
            return "No effect stands out of the spread over sentences"
        found = self.split()
        if found is None:
            return "The effect does not fall again before the last layer"
        return f"The plateau ends after layer {found[0]}; {found[1]} layers are above it"


def measure(
    name: str,
    scorer: Scorer,
    text_tokenizer,
    sentences: Sequence[Sentence],
    codes: Sequence[np.ndarray],
    *,
    heatmaps: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Curves:
    """Runs the analysis for one model.

    Args:
        name: of the model, for the plot.
        scorer: holds the model, the mesh and the batch size.
        sentences: at least two, with a text of two ids or more.
        codes: of each sentence.
        heatmaps: of how many of the first sentences the cosines are kept.
    """
    config = scorer.config
    speech = [speech_rows(own, config) for own in codes]
    text = [text_rows(text_tokenizer.encode(sentence.text), config) for sentence in sentences]
    for sentence, spoken, written in zip(sentences, speech, text, strict=True):
        scorer.check(len(spoken), sentence.name)
        if len(written) < 2 or len(spoken) < 3:
            raise MossError(
                f"{sentence.name}: text of {len(written)} ids, speech of {len(spoken) - 2} codes: expected "
                "at least two and one"
            )
    spoken_counts, written_counts = (np.array([len(x) - less for x in rows]) for rows, less in ((speech, 2), (text, 1)))
    others = other_text(text)
    size = padded_length(max(map(len, speech)))
    text_size = padded_length(max(map(len, text)))
    batches = [
        np.resize(range(first, min(first + scorer.batch_size, len(sentences))), scorer.batch_size)
        for first in range(0, len(sentences), scorer.batch_size)
    ]

    def outputs(rows, members, size):
        return scorer.apply(partial(layer_outputs, config=config), [rows[i] for i in members], size)

    # Twice over the sentences: the layers' means first, then the comparison.
    totals: dict[str, Any] = {}
    for number, members in enumerate(batches):
        fresh = np.arange(len(members)) < len(sentences) - number * scorer.batch_size  # no repeat that fills up
        for rows, counts, length in ((speech, spoken_counts, size), (text, written_counts, text_size)):
            weight = 0.5 / counts.sum()
            for block, own in outputs(rows, members, length).items():
                part = np.asarray(_sums(own, counts[members] * fresh)) * weight
                totals[block] = totals.get(block, 0) + part
        say(f"{name}: means, {min((number + 1) * scorer.batch_size, len(sentences))} of {len(sentences)} sentences")
    found: dict[bool, dict[tuple, list]] = {False: {}, True: {}}
    maps: dict[str, dict[str, np.ndarray]] = {}
    for number, members in enumerate(batches):
        left = min(scorer.batch_size, len(sentences) - number * scorer.batch_size)
        spoken = outputs(speech, members, size)
        for shuffled, rows in ((False, text), (True, others)):
            written = outputs(rows, members, text_size)
            for block in [block for block in BLOCKS if block in totals]:
                mean = totals[block]
                for centre in CENTRES:
                    scores, c = _compare(
                        spoken[block],
                        written[block],
                        spoken_counts[members],
                        written_counts[members],
                        mean if centre == "centred" else np.zeros_like(mean),
                    )
                    for score, values in scores.items():
                        found[shuffled].setdefault((block, centre, score), []).append(np.asarray(values)[:, :left])
                    if centre == "centred" and not shuffled:
                        for place, member in enumerate(members[:left]):
                            if member < heatmaps:
                                own = c[:, place, : spoken_counts[member], : written_counts[member]]
                                maps.setdefault(sentences[member].name, {})[block] = np.asarray(own)
        say(f"{name}: {number * scorer.batch_size + left} of {len(sentences)} sentences")
    curves = [{key: np.concatenate(parts, 1) for key, parts in found[shuffled].items()} for shuffled in (False, True)]
    return Curves(name, *curves, maps)


def other_text(text: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each of at least two texts (rows [N, 2]) as many rows of the others.

    They are those that follow it in an order drawn once and for all, one behind the other, and again where all of them
    together are too short.
    """
    order = np.random.default_rng(0).permutation(len(text))
    made: list[np.ndarray] = [np.zeros((0, 2), np.int32)] * len(text)
    for place, own in enumerate(order):
        following = itertools.cycle([*order[place + 1 :], *order[:place]])
        while len(made[own]) < len(text[own]):
            made[own] = np.concatenate([made[own], text[next(following)]])
        made[own] = made[own][: len(text[own])]
    return made


def numbers(curves: Curves, sentences: Sequence[Sentence]) -> dict[str, Any]:
    """The curves as JSON values: for each block, centring and score the mean and the spread (standard deviation over
    sentences) of score, floor and effect at every layer."""
    blocks: dict[str, Any] = {}
    for block, centre, score in curves.scores:
        key = (block, centre, score)
        series = {"score": curves.scores[key], "floor": curves.floors[key], "effect": curves.effect(*key)}
        blocks.setdefault(block, {}).setdefault(centre, {})[score] = {
            kind: {"mean": _rounded(values.mean(1)), "spread": _rounded(values.std(1))}
            for kind, values in series.items()
        }
    after, above = curves.split() or (None, None)
    return {
        "model": curves.name,
        "sentences": [sentence.name for sentence in sentences],
        "plateau_ends_after_layer": after,
        "layers_above": above,
        "rule": f"centred path effect >= {PLATEAU} of its top",
        "blocks": blocks,
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


def run(
    model: Any,
    file: str | Path,
    out: str | Path,
    *,
    controls: Iterable[tuple[str, Any]] = (),
    heatmaps: int = 0,
    name: str = "model",
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """The analysis of a system, and of controls with the same codes, into a new folder: similarity.json and .png.

    Args:
        model: `moss_jax.evaluate.model.EvaluatedModel`.
        file: {"audio": FILE or "codes": [...], "text": ...} a line.
        controls: (name, EvaluatedModel) of other systems with as many codes, such as one made from a plain Qwen3.
        heatmaps: also heatmap-NAME.png of the first so many sentences.

    Returns:
        A table of the effect by layer.
    """
    from moss_jax.evaluate.similarity_plot import plot_curves, plot_heatmaps

    sentences = read_sentences(file, model.code_count)
    if len(sentences) < 2:
        raise MossError(f"{file}: 1 sentence, expected at least two: the text of the others is the floor")
    with atomic_folder(out) as folder:
        found = model.codes([sentence.speech for sentence in sentences], say)
        codes = [found[sentence.speech] for sentence in sentences]
        everything = []
        for own_name, own in itertools.chain([(name, model)], controls):
            if own.code_count != model.code_count:
                raise MossError(f"{own_name}: has {own.code_count} codes, expected {model.code_count}")
            kept = heatmaps if own is model else 0
            everything.append(
                measure(own_name, own.scorer, own.text_tokenizer, sentences, codes, heatmaps=kept, say=say)
            )
        report = [numbers(curves, sentences) for curves in everything]
        (folder / "similarity.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        plot_curves(everything, folder / "similarity.png")
        for sentence, maps in everything[0].heatmaps.items():
            plot_heatmaps(maps, sentence, folder / f"heatmap-{sentence}.png")
    return "\n".join(_table(curves) for curves in everything)


def _table(curves: Curves) -> str:
    lines = [f"{curves.name}: effect (score above the floor), mean over sentences", ""]
    lines += ["| block | layer | raw match | raw path | centred match | centred path |", "|---|" + "---:|" * 5]
    base = 0
    for block in curves.blocks:
        columns = [curves.effect(block, centre, score).mean(1) for centre in CENTRES for score in SCORES]
        for place, values in enumerate(zip(*columns, strict=True), base + 1):
            lines.append(f"| {block} | {place} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
        base = len(columns[0]) if block == "shared" else base
    lines += ["", f"{curves.verdict()}."]
    return "\n".join(lines) + "\n"

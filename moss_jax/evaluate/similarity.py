"""Similarity of speech and text inside the model, layer by layer, as a guide to where the depth should be split.

Each sentence passes the model once as speech and once as text. After each layer the rows of codes are compared with the
rows of text by cosine, raw and with the layer's mean subtracted (raw cosines are inflated by a few large dimensions).
Two scores: the mean over text positions of the best speech position, and the mean along the best monotone path, which
respects order. The floor is the same score with equally long text of other sentences, since scores depend on the
lengths; the effect is the score above the floor.

The markers (sosp, eosp) and the first position of each sequence are left out. The mean of a layer is over the given
sentences, with equal weight for speech and text. Curves: the shared layers, then each branch. Source: the analysis of
arXiv 2510.00499; its formula is not published, this one is the project's.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.dialogue.grid import speech_rows, text_rows
from moss_jax.errors import MossError
from moss_jax.evaluate.alignment import best_match, best_path, cosines
from moss_jax.evaluate.curves import CENTRES, PLATEAU, SCORES, Curves, Key
from moss_jax.evaluate.items import Sentence, read_sentences
from moss_jax.evaluate.scoring import Scorer, padded_length
from moss_jax.evaluate.similarity_plot import plot_curves, plot_heatmaps
from moss_jax.files import atomic_folder
from moss_jax.nn.layers import over_last_axes
from moss_jax.progress import Say
from moss_jax.speech_lm import LayerSplitModel, SpeechLMConfig

BLOCKS = ("shared", "text", "audio")


class Tokenizer(Protocol):
    def encode(self, text: str, /) -> Sequence[int]: ...


@partial(jax.jit, static_argnames="config")
def layer_outputs(params: Any, grid: jax.Array, *, config: SpeechLMConfig) -> dict[str, jax.Array]:
    """The residual stream after every layer.

    Args:
        params: nested.
        grid: int32 [B, T, 2], padded on the right.

    Returns:
        {"shared", "text", "audio"}, those that have layers: [L, B, T, D] in the config's dtype.
    """
    positions = jnp.broadcast_to(jnp.arange(grid.shape[1]), grid.shape[:2])
    forward = partial(LayerSplitModel(config).apply, method="hidden", mutable="intermediates")
    _, collected = forward({"params": params}, grid, positions)
    return {name: stack["layers"]["output"][0] for name, stack in collected["intermediates"].items()}


@jax.jit
def _sum_rows(outputs: jax.Array, counts: jax.Array) -> jax.Array:
    """Sum over rows 1 .. counts of each sentence: outputs [L, B, T, D], counts [B] -> float32 [L, D]."""
    rows = jnp.arange(outputs.shape[2])[None]
    counted = (rows >= 1) & (rows <= counts[:, None])
    return jnp.einsum("LBTD,BT->LD", outputs, counted, preferred_element_type=jnp.float32)


@jax.jit
def _compare(
    speech: jax.Array, text: jax.Array, speech_counts: jax.Array, text_counts: jax.Array, mean: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Scores of one sentence per row.

    Args:
        speech, text: [L, B, S, D] and [L, B, T, D].
        speech_counts, text_counts: [B], positions of each sentence besides the first.
        mean: [L, D], subtracted from both; zeros compare them raw.

    Returns:
        ({score: [L, B]}, cosines [L, B, S - 1, T - 1]).
    """

    def compare_layer(layer: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        s, t, m = layer
        c = cosines(
            s[:, 1:].astype(jnp.float32) - over_last_axes(m, s), t[:, 1:].astype(jnp.float32) - over_last_axes(m, t)
        )
        match = jax.vmap(best_match)(c, speech_counts, text_counts)
        path = jax.vmap(best_path)(c, speech_counts, text_counts)
        return {"match": match, "path": path}, c

    return jax.lax.map(compare_layer, (speech, text, mean))


@dataclass(frozen=True, eq=False)
class _Batch:
    """Sentences of one call; the last batch repeats its sentences up to the batch size."""

    members: np.ndarray  # int [batch size], indices of sentences
    count: int  # of them before the repetition


def _batches(sentences: int, batch_size: int) -> list[_Batch]:
    batches = []
    for first in range(0, sentences, batch_size):
        members = range(first, min(first + batch_size, sentences))
        batches.append(_Batch(np.resize(members, batch_size), len(members)))
    return batches


@dataclass(frozen=True, eq=False)
class _Rows:
    """The grids of all sentences in one modality."""

    grids: list[np.ndarray]  # int32 [N, 2] each
    counts: np.ndarray  # int [sentences], rows that are compared
    length: int  # to which they are padded


def measure(
    name: str,
    scorer: Scorer,
    text_tokenizer: Tokenizer,
    sentences: Sequence[Sentence],
    codes: Sequence[np.ndarray],
    *,
    heatmaps: int = 0,
    say: Say = lambda line: None,
) -> Curves:
    """Runs the analysis for one model.

    Args:
        name: of the model, for the plot.
        scorer: has the model, the mesh and the batch size.
        sentences: at least two, with a text of two ids or more.
        codes: of each sentence.
        heatmaps: number of sentences, from the first on, of which the cosines are kept.
    """
    config = scorer.config
    speech_grids = [speech_rows(sentence_codes, config) for sentence_codes in codes]
    text_grids = [text_rows(text_tokenizer.encode(sentence.text), config) for sentence in sentences]
    for sentence, spoken, written in zip(sentences, speech_grids, text_grids, strict=True):
        scorer.check(len(spoken), sentence.name)
        if len(written) < 2 or len(spoken) < 3:
            raise MossError(
                f"{sentence.name}: text of {len(written)} ids, speech of {len(spoken) - 2} codes: expected "
                "at least two and one"
            )
    # Compared are the codes, without sosp and eosp, and the text ids, without the first.
    speech_counts = np.array([len(rows) - 2 for rows in speech_grids])
    text_counts = np.array([len(rows) - 1 for rows in text_grids])
    text_length = padded_length(max(map(len, text_grids)))
    speech = _Rows(speech_grids, speech_counts, padded_length(max(map(len, speech_grids))))
    text = _Rows(text_grids, text_counts, text_length)
    others = _Rows(other_text(text_grids), text_counts, text_length)
    batches = _batches(len(sentences), scorer.batch_size)

    means = _layer_means(name, scorer, (speech, text), batches, say)
    scores: dict[Key, list[np.ndarray]] = {}
    floors: dict[Key, list[np.ndarray]] = {}
    maps: dict[str, dict[str, np.ndarray]] = {}
    finished = 0
    for batch in batches:
        speech_outputs = _outputs(scorer, speech, batch)
        for rows, parts in ((text, scores), (others, floors)):
            text_outputs = _outputs(scorer, rows, batch)
            counts = (speech_counts[batch.members], text_counts[batch.members])
            for block, centre, values, c in _scores(speech_outputs, text_outputs, counts, means):
                for score in SCORES:
                    part = np.asarray(values[score])[:, : batch.count]
                    parts.setdefault((block, centre, score), []).append(part)
                if centre == "centred" and rows is text:
                    for place, member in enumerate(batch.members[: batch.count]):
                        if member < heatmaps:
                            heatmap = c[:, place, : speech_counts[member], : text_counts[member]]
                            maps.setdefault(sentences[member].name, {})[block] = np.asarray(heatmap)
        finished += batch.count
        say(f"{name}: {finished} of {len(sentences)} sentences")
    return Curves(name, _concatenate(scores), _concatenate(floors), maps)


def _outputs(scorer: Scorer, rows: _Rows, batch: _Batch) -> dict[str, jax.Array]:
    """`layer_outputs` of a batch."""
    grids = [rows.grids[i] for i in batch.members]
    outputs: dict[str, jax.Array] = scorer.apply(partial(layer_outputs, config=scorer.config), grids, rows.length)
    return outputs


def _layer_means(
    name: str, scorer: Scorer, modalities: Sequence[_Rows], batches: Sequence[_Batch], say: Say
) -> dict[str, np.ndarray]:
    """{block: [L, D]}: the mean over all compared rows, with equal weight for each modality."""
    means: dict[str, np.ndarray] = {}
    total = sum(batch.count for batch in batches)
    finished = 0
    for batch in batches:
        is_new = np.arange(len(batch.members)) < batch.count  # not a repetition
        for rows in modalities:
            weight = 1 / (len(modalities) * rows.counts.sum())
            for block, outputs in _outputs(scorer, rows, batch).items():
                part = np.asarray(_sum_rows(outputs, rows.counts[batch.members] * is_new)) * weight
                means[block] = means.get(block, 0) + part
        finished += batch.count
        say(f"{name}: means, {finished} of {total} sentences")
    return means


def _scores(
    speech: Mapping[str, jax.Array],
    text: Mapping[str, jax.Array],
    counts: tuple[np.ndarray, np.ndarray],
    means: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, str, dict[str, jax.Array], jax.Array]]:
    """(block, centre, {score: [L, B]}, cosines) of a batch."""
    for block in BLOCKS:
        if block not in means:
            continue
        for centre in CENTRES:
            mean = means[block] if centre == "centred" else np.zeros_like(means[block])
            values, c = _compare(speech[block], text[block], *counts, mean)
            yield block, centre, values, c


def _concatenate(parts: Mapping[Key, Sequence[np.ndarray]]) -> dict[Key, np.ndarray]:
    return {key: np.concatenate(arrays, 1) for key, arrays in parts.items()}


def other_text(texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each of at least two texts (rows [N, 2]) an equally long text made of the others.

    The others are concatenated in a fixed random order, beginning after the text itself, and repeated where all of them
    together are too short.
    """
    order = np.random.default_rng(0).permutation(len(texts))
    results: list[np.ndarray] = [np.zeros((0, 2), np.int32)] * len(texts)
    for place, index in enumerate(order):
        length = len(texts[index])
        following = itertools.cycle([*order[place + 1 :], *order[:place]])
        rows = results[index]
        while len(rows) < length:
            rows = np.concatenate([rows, texts[next(following)]])
        results[index] = rows[:length]
    return results


def report(curves: Curves, sentences: Sequence[Sentence]) -> dict[str, Any]:
    """The curves as JSON values: for each block, centring and score the mean and the spread (standard deviation over
    sentences) of score, floor and effect at every layer."""
    blocks: dict[str, Any] = {}
    for key in curves.scores:
        block, centre, score = key
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
    say: Say = lambda line: None,
) -> str:
    """Analyses a system, and controls with the same codes, into a new folder: similarity.json and similarity.png.

    Args:
        model: `moss_jax.evaluate.model.EvaluatedModel`.
        file: {"audio": FILE or "codes": [...], "text": ...} per line.
        controls: (name, EvaluatedModel) of other systems with the same number of codes, such as one made from a plain
            Qwen3.
        heatmaps: number of sentences, from the first on, that also get a heatmap-NAME.png.

    Returns:
        A table of the effect by layer.

    Raises:
        MossError: fewer than two sentences, or a control with another number of codes.
    """
    sentences = read_sentences(file, model.code_count)
    if len(sentences) < 2:
        raise MossError(f"{file}: 1 sentence, expected at least two: the text of the others is the floor")
    with atomic_folder(out) as folder:
        encoded = model.codes([sentence.speech for sentence in sentences], say)
        codes = [encoded[sentence.speech] for sentence in sentences]
        results = []
        for model_name, evaluated in itertools.chain([(name, model)], controls):
            if evaluated.code_count != model.code_count:
                raise MossError(f"{model_name}: has {evaluated.code_count} codes, expected {model.code_count}")
            kept = heatmaps if evaluated is model else 0
            scorer = evaluated.scorer
            tokenizer = evaluated.text_tokenizer
            results.append(measure(model_name, scorer, tokenizer, sentences, codes, heatmaps=kept, say=say))
        reports = [report(curves, sentences) for curves in results]
        (folder / "similarity.json").write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
        plot_curves(results, folder / "similarity.png")
        for sentence_name, maps in results[0].heatmaps.items():
            plot_heatmaps(maps, sentence_name, folder / f"heatmap-{sentence_name}.png")
    return "\n".join(_table(curves) for curves in results)


def _table(curves: Curves) -> str:
    lines = [
        f"{curves.name}: effect (score above the floor), mean over sentences",
        "",
        "| block | layer | raw match | raw path | centred match | centred path |",
        "|---|" + "---:|" * 5,
    ]
    num_shared_layers = 0
    for block in curves.blocks:
        columns = [curves.effect(block, centre, score).mean(1) for centre in CENTRES for score in SCORES]
        for layer, values in enumerate(zip(*columns, strict=True), num_shared_layers + 1):
            cells = " | ".join(f"{value:.4f}" for value in values)
            lines.append(f"| {block} | {layer} | {cells} |")
        if block == "shared":
            num_shared_layers = len(columns[0])
    lines += ["", f"{curves.verdict()}."]
    return "\n".join(lines) + "\n"

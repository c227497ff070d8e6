"""Likelihood pairs, as in StoryCloze: which ending of a story is more likely, in text, in speech, or mixed?

The rows are those of a document in the training data, without a chat template: text as its ids, speech as sosp, codes
and eosp. A spoken context and a spoken ending are one segment of speech. The ids or codes of the ending are scored
given the context; markers are not. The ending with the lower loss is chosen, by the sum over its rows and by their
mean: the paper does not say which of the two it used, so both are reported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.dialogue.grid import speech_rows, text_rows
from moss_jax.errors import MossError
from moss_jax.evaluate.items import ContentPart, need, need_string, read_items, read_part
from moss_jax.evaluate.model import EvaluatedModel
from moss_jax.evaluate.results import Results, accuracy_row, file_hash, write_table
from moss_jax.evaluate.scoring import Passage
from moss_jax.evaluate.words import continuation
from moss_jax.progress import Say
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Story:
    """A context and its endings; `answer` is the index of the right one."""

    name: str
    context: ContentPart
    endings: tuple[ContentPart, ...]
    answer: int
    group: str | None


def read_stories(path: str | Path, code_count: int | None = None) -> list[Story]:
    """Reads a file of {"context": PART, "endings": [PART, PART], "answer": 0 or 1, optional "group" and "id"}.

    A PART is a string, {"audio": FILE} or {"codes": [...]} with codes below `code_count`.
    """

    def parse(entry: dict[str, Any], name: str, folder: Path) -> Story:
        need(entry, ("context", "endings", "answer"), ("group",))
        endings = entry["endings"]
        answer = entry["answer"]
        if not isinstance(endings, list) or len(endings) < 2:
            raise MossError("endings: expected a list of two")
        if type(answer) is not int or not 0 <= answer < len(endings):
            raise MossError(f"answer is {answer!r}, expected the index of the right ending, 0 to {len(endings) - 1}")
        parts = tuple(read_part(e, folder, f"ending {index}", code_count) for index, e in enumerate(endings))
        if len({part.text is None for part in parts}) > 1:
            raise MossError("endings: expected all of them in text or all in speech")
        group = need_string(entry, "group") if "group" in entry else None
        return Story(name, read_part(entry["context"], folder, "context", code_count), parts, answer, group)

    return read_items(path, parse)


def passage(
    context: ContentPart,
    ending: ContentPart,
    codes: Mapping[ContentPart, np.ndarray],
    text_tokenizer: TextTokenizer,
    config: SpeechLMConfig,
) -> Passage:
    """The rows of a story with one ending; the ids or codes of the ending are scored."""
    if context.text is None and ending.text is None:
        rows = speech_rows(np.concatenate([codes[context], codes[ending]]), config)
        first = 1 + len(codes[context])
        last = len(rows) - 1
    else:
        rows = _rows(context, context.text, codes, text_tokenizer, config)
        text = ending.text
        if text is not None and context.text is not None:
            text = continuation(context.text, text)
        ending_rows = _rows(ending, text, codes, text_tokenizer, config)
        markers = int(ending.text is None)  # sosp before and eosp after a spoken ending are not scored
        first = len(rows) + markers
        last = len(rows) + len(ending_rows) - markers
        rows = np.concatenate([rows, ending_rows])
    scored = np.zeros(len(rows), bool)
    scored[first:last] = True
    return Passage(rows, scored)


def _rows(
    part: ContentPart,
    text: str | None,
    codes: Mapping[ContentPart, np.ndarray],
    text_tokenizer: TextTokenizer,
    config: SpeechLMConfig,
) -> np.ndarray:
    return speech_rows(codes[part], config) if text is None else text_rows(text_tokenizer.encode(text), config)


def run(model: EvaluatedModel, file: str | Path, out: str | Path, *, say: Say = lambda line: None) -> str:
    """Evaluates a file of stories and writes the results to the folder `out`; returns the table.

    Raises:
        MossError: wrong lines, a recording that cannot be read, a story longer than the model's context, or a folder
            with results of another evaluation.
    """
    stories = read_stories(file, model.code_count)
    with Results(out, {"task": "pairs", "file": file_hash(file), "model": model.language_model_hash()}) as results:
        remaining = [story for story in stories if story.name not in results.done]
        codes = model.codes([part for story in remaining for part in (story.context, *story.endings)], say)
        groups = []
        for story in remaining:
            groups.append(
                [passage(story.context, ending, codes, model.text_tokenizer, model.config) for ending in story.endings]
            )
            model.scorer.check(max(len(p.rows) for p in groups[-1]), f"{file}, {story.name}")
        for complete in model.scorer.likelihoods(groups):
            results.append([_record(remaining[i], groups[i], sums) for i, sums in complete])
            say(f"{len(results.done)} of {len(stories)} stories")
        return write_table(results.folder, _table([results.done[story.name] for story in stories]))


def _record(story: Story, passages: Sequence[Passage], sums: Sequence[float]) -> dict[str, Any]:
    counts = [int(p.scored.sum()) for p in passages]
    means = [value / count for value, count in zip(sums, counts, strict=True)]
    right = {kind: _best(values) == story.answer for kind, values in (("sum", sums), ("mean", means))}
    return {"id": story.name, "group": story.group, "sums": list(sums), "rows": counts, "right": right}


def _best(values: Sequence[float]) -> int:
    """The index of the largest value; -1 if it occurs twice, so that a tie is never right."""
    best = max(values)
    return list(values).index(best) if list(values).count(best) == 1 else -1


def _table(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    names = {record["group"] for record in records}
    groups = sorted(name for name in names if name)
    if len(names) == 1:
        groups = []  # the row of the only group would repeat "all"
    for group in (None, *groups):
        members = [record for record in records if group in (None, record["group"])]
        for kind in ("sum", "mean"):
            row = accuracy_row(group or "all", [record["right"][kind] for record in members])
            rows.append({"what": row.pop("what"), "compared by": kind, **row})
    return rows

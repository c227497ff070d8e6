"""Spoken questions (LlamaQuestions, TriviaQA, WebQuestions): is the answer in the written or spoken reply?

A question is a recording, codes or text; the reply is written (S->T) or spoken (S->S). Spoken replies are decoded to
audio and transcribed by a judge. A reply is right if the words of one of the answers occur in it, in order and side by
side (`moss_jax.evaluate.words`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.evaluate.items import ContentPart, need, need_string, read_items, read_part
from moss_jax.evaluate.judge import Judge
from moss_jax.evaluate.model import EvaluatedModel
from moss_jax.evaluate.results import Results, accuracy_row, file_hash, write_table
from moss_jax.evaluate.words import contains_answer
from moss_jax.progress import Say
from moss_jax.text.chat_template import REPLIES
from moss_jax.text.words import normalized_words

WAVE_FOLDER = "waves"


@dataclass(frozen=True)
class SpokenQuestion:
    """A question and its accepted answers."""

    name: str
    question: ContentPart
    answers: tuple[str, ...]
    group: str | None


def read_spoken_questions(path: str | Path, code_count: int | None = None) -> list[SpokenQuestion]:
    """Reads a file of {"question": PART, "answers": [...], optional "group" and "id"}.

    A PART is a string, {"audio": FILE} or {"codes": [...]} with codes below `code_count`.
    """

    def parse(entry: dict[str, Any], name: str, folder: Path) -> SpokenQuestion:
        need(entry, ("question", "answers"), ("group",))
        answers = entry["answers"]
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise MossError("answers: expected a list of strings, at least one")
        if wordless := [a for a in answers if not normalized_words(a)]:
            raise MossError(f"answers: {wordless[0]!r} has no words")
        group = need_string(entry, "group") if "group" in entry else None
        return SpokenQuestion(name, read_part(entry["question"], folder, "question", code_count), tuple(answers), group)

    return read_items(path, parse)


def run(
    model: EvaluatedModel,
    file: str | Path,
    out: str | Path,
    *,
    reply: str = "speech",
    judge: Judge | None = None,
    voice: str | None = None,
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
    say: Say = lambda line: None,
) -> str:
    """Evaluates a file of questions and writes the results to the folder `out`; returns the table.

    Args:
        reply: "speech" or "text". The audio of spoken replies is kept in `out`/waves.
        judge: transcribes spoken replies.
        voice: of spoken replies; None: the system's default.
        sampling: keywords of `moss_jax.dialogue.system.generation_settings`; greedy by default.
        seed: of sampling; a resumed evaluation gives the same replies as an uninterrupted one.
        say: receives progress messages.

    Raises:
        MossError: wrong lines, a recording that cannot be read, no judge for spoken replies, or a folder with results
            of another evaluation.
    """
    if reply not in REPLIES:
        raise MossError(f"reply: {reply!r}, expected one of {', '.join(REPLIES)}")
    if reply == "speech" and judge is None:
        raise MossError("spoken replies need a judge: expected one of --judge FOLDER and --judge-command")
    questions = read_spoken_questions(file, model.code_count)
    sampling = {"greedy": True, **(sampling or {})}
    model.system.settings(**sampling)
    about: dict[str, Any] = {
        "task": "spoken-qa",
        "file": file_hash(file),
        "reply": reply,
        "seed": seed,
        "sampling": sampling,
    }
    if judge is not None and reply == "speech":
        about |= {"judge": judge.name, "voice": voice, "codec": model.codec_hash()}
    with Results(out, {**about, "model": model.language_model_hash()}) as results:
        done = len(results.done)  # items are finished in the order of the file
        waves = results.folder / WAVE_FOLDER
        if reply == "speech":
            waves.mkdir(exist_ok=True)
        remaining = questions[done:]
        turns = [[_turn(question.question)] for question in remaining]
        replies = model.system.reply_batch(
            turns, reply=reply, voice=voice, batch_size=model.batch_size, seed=seed, first_request=done, **sampling
        )
        for question, answer in zip(remaining, replies if remaining else (), strict=True):
            record: dict[str, Any] = {"id": question.name, "group": question.group, "complete": answer.complete}
            text = answer.text
            if judge is not None and reply == "speech":
                text = ""
                if answer.wave is not None and answer.wave.size:
                    path = waves / f"{question.name}.wav"
                    answer.save(path)
                    text = judge(path)
                record["codes"] = len(answer.codes)
            results.append([record | {"said": text, "right": contains_answer(text, question.answers)}])
            say(f"{len(results.done)} of {len(questions)} questions")
        return write_table(results.folder, *_table([results.done[question.name] for question in questions], reply))


def _turn(part: ContentPart) -> Turn:
    return Turn("user", text=part.text, audio=part.audio, codes=part.codes)


def _table(records: Sequence[dict[str, Any]], reply: str) -> tuple[list[dict[str, Any]], list[str]]:
    rows = [accuracy_row("all", [record["right"] for record in records])]
    groups = sorted({record["group"] for record in records if record["group"]})
    rows += [accuracy_row(group, [r["right"] for r in records if r["group"] == group]) for group in groups]
    notes = []
    if cut := sum(not record["complete"] for record in records):
        notes.append(f"Cut off by max_new_tokens: {cut} replies.")
    if reply == "speech" and (silent := sum(not record["codes"] for record in records)):
        notes.append(f"Without any speech: {silent} replies.")
    return rows, notes

"""Multiple-choice questions in text, in the format of MMLU and CMMLU: which letter does the model say next?

The prompt is the usual one, without a chat template:

    The following are multiple choice questions (with answers) about SUBJECT.

    QUESTION
    A. CHOICE
    B. CHOICE
    Answer: A          <- for each example; after the question itself, the letter is what is asked for

The letters' probabilities as the next row are compared.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.dialogue.grid import text_rows
from moss_jax.documents import read_text
from moss_jax.errors import MossError
from moss_jax.evaluate.items import collect, need, need_string, read_items
from moss_jax.evaluate.model import EvaluatedModel
from moss_jax.evaluate.results import Results, accuracy_row, file_hash, write_table
from moss_jax.files import is_folder

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HEADER = "The following are multiple choice questions (with answers){about}.\n\n"
PARTS = ("_test", "_val", "_dev")  # what MMLU's files end in, after the subject


@dataclass(frozen=True)
class ChoiceQuestion:
    name: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str


def read_choice_questions(path: str | Path) -> list[ChoiceQuestion]:
    """Questions of a .csv or .jsonl file, or of all of them in a folder.

    A line of JSON is {"question": ..., "choices": [...], "answer": place from 0 or letter, optional "subject", "id"}. A
    CSV has MMLU's columns (question, choices, letter) without a heading, or a heading with Question, A, B, ..., Answer,
    as CMMLU has. The subject of a CSV is its file's name, without _test, _val, _dev.

    Raises:
        MossError: every line that is wrong, of every file.
    """
    path = Path(path)
    if not is_folder(path):
        return _file(path)
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in (".csv", ".jsonl")]
    if not files:
        raise MossError(f"{path}: no .csv and no .jsonl in it")
    questions = []
    problems = []
    for file in files:
        try:
            questions += [ChoiceQuestion(f"{file.name} {q.name}", *_rest(q)) for q in _file(file)]
        except MossError as error:
            problems.append(str(error))
    if problems:
        raise MossError("\n".join(problems))
    return questions


def _rest(question: ChoiceQuestion) -> tuple:
    return question.question, question.choices, question.answer, question.subject


def _file(path: Path) -> list[ChoiceQuestion]:
    subject = path.stem
    for part in PARTS:
        subject = subject.removesuffix(part)

    def parse(entry: dict[str, Any], name: str, folder: Path) -> ChoiceQuestion:
        need(entry, ("question", "choices", "answer"), ("subject",))
        choices = entry["choices"]
        answer = entry["answer"]
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise MossError(f"choices: expected a list of 2 to {len(LETTERS)}")
        if not all(isinstance(choice, str) for choice in choices):
            raise MossError("choices: expected strings")
        letters = LETTERS[: len(choices)]
        if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
            answer = letters.index(answer.strip().upper())
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise MossError(f"answer is {answer!r}, expected a letter, A to {letters[-1]}, or a place from 0")
        about = need_string(entry, "subject", subject if path.suffix.lower() == ".csv" else "all")
        question = need_string(entry, "question").strip()
        return ChoiceQuestion(name, question, tuple(c.strip() for c in choices), answer, about.replace("_", " "))

    if path.suffix.lower() == ".csv":
        return collect(path, _csv(path), parse)
    return read_items(path, parse)


def _csv(path: Path) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    columns: dict[str, int] | None = None
    end = 0
    while True:
        number = end + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield number, _fails(f"not CSV ({error})")
            return
        if fields is None:
            return
        end = reader.line_num
        if not any(field.strip() for field in fields):
            continue
        if columns is None:
            heading = {field.strip().lower(): place for place, field in enumerate(fields)}
            if "question" in heading and "answer" in heading:
                columns = heading
                continue
            columns = {}
        yield number, lambda fields=fields, columns=columns: _csv_entry(fields, columns)


def _csv_entry(fields: Sequence[str], columns: dict[str, int]) -> dict[str, Any]:
    if not columns:
        if len(fields) < 4:
            raise MossError(f"has {len(fields)} columns, expected a question, at least two choices and a letter")
        return {"question": fields[0], "choices": list(fields[1:-1]), "answer": fields[-1]}
    if len(fields) != max(columns.values()) + 1:
        raise MossError(f"has {len(fields)} columns, the heading has {max(columns.values()) + 1}")
    choices = [fields[columns[letter.lower()]] for letter in LETTERS if letter.lower() in columns]
    entry = {"question": fields[columns["question"]], "choices": choices, "answer": fields[columns["answer"]]}
    return entry | ({"subject": fields[columns["subject"]]} if "subject" in columns else {})


def _fails(message: str) -> Callable[[], dict[str, Any]]:
    def fail():
        raise MossError(message)

    return fail


def prompt(question: ChoiceQuestion, examples: Sequence[ChoiceQuestion]) -> str:
    """The text up to "Answer:", which the letter follows."""
    about = "" if question.subject == "all" else f" about {question.subject}"
    shown = "".join(f"{_asked(example)} {LETTERS[example.answer]}\n\n" for example in examples)
    return HEADER.format(about=about) + shown + _asked(question)


def _asked(question: ChoiceQuestion) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([question.question, *lines, "Answer:"])


def letter_ids(text_tokenizer, count: int) -> tuple[list[int], list[int]]:
    """(ids between "Answer:" and the letter, the one id of each letter): " A" is one id in most vocabularies."""
    ids = [text_tokenizer.encode(f" {letter}") for letter in LETTERS[:count]]
    between = ids[0][:-1]
    last = [own[-1] for own in ids]
    if all(own[:-1] == between for own in ids) and len(set(last)) == count:
        return between, last
    raise MossError("the text tokenizer does not end ' A', ' B', ... in one id each, so letters cannot be compared")


def run(
    model: EvaluatedModel,
    file: str | Path,
    out: str | Path,
    *,
    shots: int = 0,
    examples: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Evaluates questions into the folder `out`; returns the table.

    Args:
        file: as `read_choices` takes it.
        shots: answered questions of the same subject before each question, the first ones of `examples`.
        examples: in the same formats; needed for shots.

    Raises:
        MossError: bad lines, fewer examples than shots, a prompt longer than the model's context.
    """
    if shots < 0 or bool(shots) != (examples is not None):
        raise MossError(f"shots: {shots} and examples {examples}: expected both, or neither")
    questions = read_choice_questions(file)
    shown: dict[str, list[ChoiceQuestion]] = {}
    for example in read_choice_questions(examples) if shots else []:
        shown.setdefault(example.subject, []).append(example)
    if short := sorted({q.subject for q in questions if len(shown.get(q.subject, ())) < shots}):
        raise MossError(f"{examples}: fewer than {shots} examples of: {', '.join(short)}")
    about = {"task": "choice", "file": file_hash(file), "shots": shots, "model": model.language_model_hash()}
    about |= {"examples": file_hash(examples)} if shots else {}
    with Results(out, about) as results:
        left = [question for question in questions if question.name not in results.done]
        prompts = []
        candidates = []
        for question in left:
            between, letters = letter_ids(model.text_tokenizer, len(question.choices))
            ids = model.text_tokenizer.encode(prompt(question, shown.get(question.subject, [])[:shots]))
            prompts.append(text_rows([*ids, *between], model.config))
            candidates.append(letters)
            model.scorer.check(len(prompts[-1]), f"{file}, {question.name}")
        for complete in model.scorer.choices(prompts, candidates):
            results.append([_record(left[i], values) for i, values in complete])
            say(f"{len(results.done)} of {len(questions)} questions")
        return write_table(results.folder, *_table([results.done[question.name] for question in questions]))


def _record(question: ChoiceQuestion, values: Sequence[float]) -> dict[str, Any]:
    said = int(np.argmax(values))
    return {
        "id": question.name,
        "subject": question.subject,
        "log_probabilities": list(values),
        "said": LETTERS[said],
        "right": said == question.answer,
    }


def _table(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    rows = [accuracy_row("all", [record["right"] for record in records])]
    subjects = sorted({record["subject"] for record in records})
    if len(subjects) < 2:
        return rows, []
    rows += [accuracy_row(s, [record["right"] for record in records if record["subject"] == s]) for s in subjects]
    mean = sum(row["right"] / row["items"] for row in rows[1:]) / len(subjects)
    return rows, [f"Mean over {len(subjects)} subjects: {100 * mean:.2f} %"]

"""Multiple-choice questions in text, in the format of MMLU and CMMLU: which letter is the most likely answer?

The prompt is the usual one, without a chat template:

    The following are multiple choice questions (with answers) about SUBJECT.

    QUESTION
    A. CHOICE
    B. CHOICE
    Answer: A          <- only in the examples; for the question itself the model predicts the letter

The probabilities of the letters as the next token are compared.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.dialogue.grid import text_rows
from moss_jax.documents import read_text
from moss_jax.errors import MossError
from moss_jax.evaluate.items import collect_items, need, need_string, read_items
from moss_jax.evaluate.model import EvaluatedModel
from moss_jax.evaluate.results import Results, accuracy_row, file_hash, write_table
from moss_jax.files import is_folder
from moss_jax.progress import Say
from moss_jax.text.tokenizer import TextTokenizer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PROMPT_HEADER = "The following are multiple choice questions (with answers){about}.\n\n"
SPLIT_SUFFIXES = ("_test", "_val", "_dev")  # of MMLU's file names, after the subject


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with its choices; `answer` is the index of the right one."""

    name: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str


def read_choice_questions(path: str | Path) -> list[ChoiceQuestion]:
    """The questions of a .csv or .jsonl file, or of all such files in a folder.

    A line of JSON is {"question": ..., "choices": [...], "answer": index or letter, optional "subject", "id"}. A CSV
    has MMLU's columns (question, choices, letter) without a header, or a header with Question, A, B, ..., Answer as in
    CMMLU. The subject of a CSV is its file name without _test, _val or _dev.

    Raises:
        MossError: the full list of wrong lines in all files.
    """
    path = Path(path)
    if not is_folder(path):
        return _read_file(path)
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in (".csv", ".jsonl")]
    if not files:
        raise MossError(f"{path}: contains no .csv or .jsonl file")
    questions = []
    problems = []
    for file in files:
        try:
            questions += [replace(q, name=f"{file.name} {q.name}") for q in _read_file(file)]
        except MossError as error:
            problems.append(str(error))
    if problems:
        raise MossError("\n".join(problems))
    return questions


def _read_file(path: Path) -> list[ChoiceQuestion]:
    subject = path.stem
    for part in SPLIT_SUFFIXES:
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
            raise MossError(f"answer is {answer!r}, expected a letter, A to {letters[-1]}, or an index from 0")
        about = need_string(entry, "subject", subject if path.suffix.lower() == ".csv" else "all")
        question = need_string(entry, "question").strip()
        return ChoiceQuestion(name, question, tuple(c.strip() for c in choices), answer, about.replace("_", " "))

    if path.suffix.lower() == ".csv":
        return collect_items(path, _csv_entries(path), parse)
    return read_items(path, parse)


def _csv_entries(path: Path) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """(line number, function that returns the entry) of each row, for `collect_items`."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    columns: dict[str, int] | None = None
    end = 0
    while True:
        number = end + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield number, partial(_fail, f"not CSV ({error})")
            return
        if fields is None:
            return
        end = reader.line_num
        if not any(field.strip() for field in fields):
            continue
        if columns is None:
            header = {field.strip().lower(): column for column, field in enumerate(fields)}
            if "question" in header and "answer" in header:
                columns = header
                continue
            columns = {}
        yield number, partial(_csv_entry, fields, columns)


def _csv_entry(fields: Sequence[str], columns: dict[str, int]) -> dict[str, Any]:
    """The entry of a row; `columns` is empty for a file without a header."""
    if not columns:
        if len(fields) < 4:
            raise MossError(f"has {len(fields)} columns, expected a question, at least two choices and a letter")
        return {"question": fields[0], "choices": list(fields[1:-1]), "answer": fields[-1]}
    if len(fields) != max(columns.values()) + 1:
        raise MossError(f"has {len(fields)} columns, the header has {max(columns.values()) + 1}")
    choices = [fields[columns[letter.lower()]] for letter in LETTERS if letter.lower() in columns]
    entry = {"question": fields[columns["question"]], "choices": choices, "answer": fields[columns["answer"]]}
    return entry | ({"subject": fields[columns["subject"]]} if "subject" in columns else {})


def _fail(message: str) -> dict[str, Any]:
    raise MossError(message)


def prompt(question: ChoiceQuestion, examples: Sequence[ChoiceQuestion]) -> str:
    """The prompt up to "Answer:", after which the model predicts the letter."""
    about = "" if question.subject == "all" else f" about {question.subject}"
    shown = "".join(f"{_question_text(example)} {LETTERS[example.answer]}\n\n" for example in examples)
    return PROMPT_HEADER.format(about=about) + shown + _question_text(question)


def _question_text(question: ChoiceQuestion) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([question.question, *lines, "Answer:"])


def letter_ids(text_tokenizer: TextTokenizer, count: int) -> tuple[list[int], list[int]]:
    """(ids between "Answer:" and the letter, id of each letter). In most vocabularies " A" is a single id.

    Raises:
        MossError: the letters do not differ in exactly their last id.
    """
    ids = [text_tokenizer.encode(f" {letter}") for letter in LETTERS[:count]]
    between = ids[0][:-1]
    last = [letter[-1] for letter in ids]
    if all(letter[:-1] == between for letter in ids) and len(set(last)) == count:
        return between, last
    raise MossError(
        "the text tokenizer does not encode ' A', ' B', ... with a single last id each; letters cannot be compared"
    )


def run(
    model: EvaluatedModel,
    file: str | Path,
    out: str | Path,
    *,
    shots: int = 0,
    examples: str | Path | None = None,
    say: Say = lambda line: None,
) -> str:
    """Evaluates questions and writes the results to the folder `out`; returns the table.

    Args:
        file: see `read_choice_questions`.
        shots: number of answered questions of the same subject before each question, the first ones of `examples`.
        examples: file or folder in the same formats; needed for shots.
        say: receives progress messages.

    Raises:
        MossError: wrong lines, fewer examples than shots, or a prompt longer than the model's context.
    """
    if shots < 0 or bool(shots) != (examples is not None):
        raise MossError(f"shots: {shots} and examples {examples}: expected both, or neither")
    questions = read_choice_questions(file)
    shown: dict[str, list[ChoiceQuestion]] = {}
    if examples is not None:
        for example in read_choice_questions(examples):
            shown.setdefault(example.subject, []).append(example)
    if short := sorted({q.subject for q in questions if len(shown.get(q.subject, ())) < shots}):
        raise MossError(f"{examples}: fewer than {shots} examples of: {', '.join(short)}")
    about = {"task": "choice", "file": file_hash(file), "shots": shots, "model": model.language_model_hash()}
    if examples is not None:
        about["examples"] = file_hash(examples)
    with Results(out, about) as results:
        remaining = [question for question in questions if question.name not in results.done]
        prompts = []
        candidates = []
        for question in remaining:
            between, letters = letter_ids(model.text_tokenizer, len(question.choices))
            ids = model.text_tokenizer.encode(prompt(question, shown.get(question.subject, [])[:shots]))
            prompts.append(text_rows([*ids, *between], model.config))
            candidates.append(letters)
            model.scorer.check(len(prompts[-1]), f"{file}, {question.name}")
        for complete in model.scorer.choices(prompts, candidates):
            results.append([_record(remaining[i], values) for i, values in complete])
            say(f"{len(results.done)} of {len(questions)} questions")
        return write_table(results.folder, *_table([results.done[question.name] for question in questions]))


def _record(question: ChoiceQuestion, values: Sequence[float]) -> dict[str, Any]:
    predicted = int(np.argmax(values))
    return {
        "id": question.name,
        "subject": question.subject,
        "log_probabilities": list(values),
        "said": LETTERS[predicted],
        "right": predicted == question.answer,
    }


def _table(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    rows = [accuracy_row("all", [record["right"] for record in records])]
    subjects = sorted({record["subject"] for record in records})
    if len(subjects) < 2:
        return rows, []
    rows += [accuracy_row(s, [record["right"] for record in records if record["subject"] == s]) for s in subjects]
    mean = sum(row["right"] / row["items"] for row in rows[1:]) / len(subjects)
    return rows, [f"Mean over {len(subjects)} subjects: {100 * mean:.2f} %"]

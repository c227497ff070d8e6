"""Nano's test items: questions, their speakers and the right answers. Frozen in the package as text, spoken on demand.

    items/voices.jsonl      trained phrasings, reserved voices
          phrasings.jsonl   reserved phrasings, trained voices
          both.jsonl        reserved phrasings, reserved voices
          seen.jsonl        trained phrasings, trained voices; the question itself is held out
          two-turn.jsonl    a question and one that refers to its answer, reserved voices
          new-subject.jsonl a question and an unrelated one, reserved voices
          sentences.jsonl   answers that speech tokenizer and decoder were not trained on, answering voice

`make_items` made these files, and they must not change. For a domain that was changed,
`python -m moss_jax.recipes.nano.items FOLDER` writes new ones.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jax.data.corpus import write_manifest
from moss_jax.documents import parse_object, read_lines
from moss_jax.errors import MossError
from moss_jax.files import write_text
from moss_jax.recipes.nano import domain
from moss_jax.recipes.nano.domain import ANSWER_SPEAKER, RESERVED_VOICES, SOCIAL, VOICES, DomainQuestion
from moss_jax.recipes.nano.recordings import Utterance, synthesize

ITEMS_FOLDER = Path(__file__).with_name("items")
SETS = {
    "voices": "unseen voices",
    "phrasings": "unseen phrasings",
    "both": "unseen voices and phrasings",
    "seen": "seen voices and phrasings",
    "two-turn": "two turns, unseen voices",
    "new-subject": "a second question on its own, unseen voices",
    "sentences": "unseen answers, for the codec",
}
QUESTION_COUNTS = {
    "voices": {
        "sum": 90,
        "difference": 90,
        "greater": 35,
        "less": 35,
        "digits": 80,
        "capital": 30,
        "colour": 24,
        **dict.fromkeys(SOCIAL, 8),
    },
    "phrasings": {
        "sum": 60,
        "difference": 60,
        "greater": 25,
        "less": 25,
        "digits": 50,
        "capital": 10,
        "colour": 8,
        **dict.fromkeys(SOCIAL, 4),
    },
    "both": {
        "sum": 25,
        "difference": 25,
        "greater": 10,
        "less": 10,
        "digits": 22,
        "capital": 10,
        "colour": 8,
        **dict.fromkeys(SOCIAL, 2),
    },
    "seen": {
        "sum": 45,
        "difference": 45,
        "greater": 18,
        "less": 18,
        "digits": 40,
        "capital": 14,
        "colour": 10,
        **dict.fromkeys(SOCIAL, 2),
    },
    "two-turn": {"sum": 40, "difference": 40, "capital": 20, "colour": 20, "digits": 20},
    "new-subject": {
        "sum": 20,
        "difference": 20,
        "greater": 10,
        "less": 10,
        "digits": 20,
        "capital": 10,
        "colour": 8,
        **dict.fromkeys(SOCIAL, 2),
    },
}


@dataclass(frozen=True)
class Item:
    """One test item.

    Attributes:
        name: unique.
        kind: of the fact that the first question is about.
        questions, answers: one of each per turn; a sentence for the codec has no questions.
        voice, words_per_minute, pitch: of the questions, or of the sentence.
    """

    name: str
    kind: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    voice: str
    words_per_minute: int
    pitch: int

    def to_json(self) -> dict[str, Any]:
        turns = (
            [*self.questions, *self.answers]
            if not self.questions
            else [part for pair in zip(self.questions, self.answers, strict=True) for part in pair]
        )
        return {
            "id": self.name,
            "kind": self.kind,
            "turns": turns,
            "voice": self.voice,
            "words_per_minute": self.words_per_minute,
            "pitch": self.pitch,
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Item":
        turns = entry["turns"]
        questions, answers = (turns[::2], turns[1::2]) if len(turns) > 1 else ([], turns)
        return cls(
            entry["id"],
            entry["kind"],
            tuple(questions),
            tuple(answers),
            entry["voice"],
            entry["words_per_minute"],
            entry["pitch"],
        )


def make_items(seed: int = 0) -> dict[str, list[Item]]:
    """{set: its items}; a function of the seed and the domain alone."""
    items = {}
    for name, amounts in QUESTION_COUNTS.items():
        draw = random.Random(f"nano items {name} {seed}")
        reserved_phrasing = name in ("phrasings", "both")
        voices = VOICES if name in ("phrasings", "seen") else RESERVED_VOICES
        picked = [
            question for kind, amount in amounts.items() for question in _pick(kind, amount, reserved_phrasing, draw)
        ]
        others: list[DomainQuestion | None] = [None] * len(picked)
        if name == "new-subject":
            others = [*draw.sample(picked, len(picked))]
        items[name] = [
            _item(f"{name}-{i:04d}", question, voices, draw, name, other)
            for i, (question, other) in enumerate(zip(picked, others, strict=True))
        ]
    kind = {fact.answer: fact.kind for fact in domain.facts()}
    held_out = [text for text in domain.answers() if domain.answer_is_held_out(text)]
    items["sentences"] = [
        Item(f"sentences-{i:04d}", kind[text], (), (text,), *ANSWER_SPEAKER) for i, text in enumerate(held_out)
    ]
    return items


def _pick(kind: str, amount: int, reserved_phrasing: bool, draw: random.Random) -> list[DomainQuestion]:
    """Questions of a kind that no training manifest has; each once before any is repeated by another speaker."""
    candidates = [question for question in domain.questions() if question.fact.kind == kind]
    if reserved_phrasing:
        candidates = [question for question in candidates if question.reserved]
    elif kind in SOCIAL:  # a social turn is nothing but its phrasing; it is new only in its speaker
        candidates = [question for question in candidates if not question.reserved]
    else:
        candidates = [question for question in candidates if question.held_out and not question.reserved]
    picked: list[DomainQuestion] = []
    while len(picked) < amount:
        picked += draw.sample(candidates, len(candidates))
    return picked[:amount]


def _item(
    name: str,
    question: DomainQuestion,
    voices: Sequence[str],
    draw: random.Random,
    group: str,
    other: DomainQuestion | None,
) -> Item:
    """An item that asks `question` and, in a second turn, a follow-up or the `other` question."""
    questions = [question.text]
    answers = [question.fact.answer]
    if group == "two-turn":
        second = draw.choice(list(domain.follow_ups(question.fact, reserved=draw.random() < 0.5)))
        questions.append(second.text)
        answers.append(second.answer)
    elif other is not None:
        questions.append(other.text)
        answers.append(other.fact.answer)
    return Item(name, question.fact.kind, tuple(questions), tuple(answers), *domain.draw_speaker(draw, tuple(voices)))


def read_items(group: str, folder: Path = ITEMS_FOLDER) -> list[Item]:
    """The frozen items of a set, a key of SETS."""
    if group not in SETS:
        raise MossError(f"items {group!r}: unknown, expected one of {', '.join(SETS)}")
    return [Item.from_json(parse_object(line.content)) for line in read_lines(folder / f"{group}.jsonl")]


def write_items(folder: Path) -> None:
    """Writes the items of `make_items`, as files like the frozen ones."""
    for group, items in make_items().items():
        write_text(folder / f"{group}.jsonl", "".join(json.dumps(item.to_json()) + "\n" for item in items))


def synthesize_items(group: str, folder: Path, items: Sequence[Item]) -> list[dict[str, list[Path]]]:
    """Synthesises items of a set into FOLDER/GROUP, where they are not there already.

    FOLDER/GROUP.jsonl is a manifest of the questions (of the sentences, where there are none) with their texts.

    Returns:
        For each item {"questions": 16 kHz recordings, "answers": 24 kHz ones of the answering voice}, one per turn.
    """
    recordings = []
    lines = []
    (folder / group).mkdir(parents=True, exist_ok=True)
    for item in items:
        question_speaker = (item.voice, item.words_per_minute, item.pitch)
        paths = {}
        for use, speaker, texts in (
            ("question", question_speaker, item.questions),
            ("answer", ANSWER_SPEAKER, item.answers),
        ):
            paths[f"{use}s"] = [
                _recording(folder, f"{group}/{item.name}-{use[0]}{turn}.wav", Utterance(text, *speaker, use))
                for turn, text in enumerate(texts)
            ]
        recordings.append(paths)
        spoken = zip(item.questions or item.answers, paths["questions"] or paths["answers"], strict=True)
        lines += [{"audio": str(path.relative_to(folder)), "text": text} for text, path in spoken]
    write_manifest(folder / f"{group}.jsonl", lines)
    return recordings


def _recording(folder: Path, place: str, utterance: Utterance) -> Path:
    if not (folder / place).exists():
        synthesize(folder, place, utterance)
    return folder / place


if __name__ == "__main__":
    write_items(Path(sys.argv[1]))

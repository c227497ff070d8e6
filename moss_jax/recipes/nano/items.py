"""Nano's test items: what is asked, by whom, what is right to answer. Frozen in the package as text, spoken on demand.

    items/voices.jsonl      trained phrasings, reserved voices
          phrasings.jsonl   reserved phrasings, trained voices
          both.jsonl        reserved phrasings, reserved voices
          seen.jsonl        trained phrasings, trained voices; the question itself is kept from training
          two-turn.jsonl    a question and one that refers back to it, reserved voices
          new-subject.jsonl a question and one that has nothing to do with it, reserved voices
          sentences.jsonl   answers that the speech tokenizer and the decoder have not heard, in the answering voice

`make_items` made these files once. To write them again (to another domain: these are frozen):
`python -m moss_jax.recipes.nano.items FOLDER`.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moss_jax.checkpoint import write_text
from moss_jax.data.corpus import write_manifest
from moss_jax.documents import parse_object, read_lines
from moss_jax.errors import MossError
from moss_jax.recipes.nano import domain
from moss_jax.recipes.nano.corpus import Utterance, synthesize
from moss_jax.recipes.nano.domain import ANSWER_SPEAKER, RESERVED_VOICES, SOCIAL, VOICES, DomainQuestion

FOLDER = Path(__file__).with_name("items")
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
    """What one item says.

    Attributes:
        name: unlike every other one's.
        kind: of the fact that its first question asks for.
        questions, answers: one of each a turn; a sentence for the codec has no questions.
        voice, words_per_minute, pitch: who asks, or who says the sentence.
    """

    name: str
    kind: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    voice: str
    words_per_minute: int
    pitch: int

    def to_json(self) -> dict:
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
    def from_json(cls, entry: dict) -> "Item":
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
    made = {}
    for name, amounts in QUESTION_COUNTS.items():
        draw = random.Random(f"nano items {name} {seed}")
        reserved_phrasing = name in ("phrasings", "both")
        voices = VOICES if name in ("phrasings", "seen") else RESERVED_VOICES
        picked = [
            question for kind, amount in amounts.items() for question in _pick(kind, amount, reserved_phrasing, draw)
        ]
        others = draw.sample(picked, len(picked)) if name == "new-subject" else [None] * len(picked)
        made[name] = [
            _item(f"{name}-{i:04d}", question, voices, draw, name, other)
            for i, (question, other) in enumerate(zip(picked, others, strict=True))
        ]
    kind = {fact.answer: fact.kind for fact in domain.facts()}
    held_out = [text for text in domain.answers() if domain.answer_is_held_out(text)]
    made["sentences"] = [
        Item(f"sentences-{i:04d}", kind[text], (), (text,), *ANSWER_SPEAKER) for i, text in enumerate(held_out)
    ]
    return made


def _pick(kind: str, amount: int, reserved_phrasing: bool, draw: random.Random) -> list[DomainQuestion]:
    """Questions of a kind that no training manifest has; each once before any comes twice (by other speakers)."""
    own = [question for question in domain.questions() if question.fact.kind == kind]
    if reserved_phrasing:
        own = [question for question in own if question.reserved]
    elif kind in SOCIAL:  # a social turn is its phrasing: trained phrasings are heard from other speakers
        own = [question for question in own if not question.reserved]
    else:
        own = [question for question in own if question.held_out and not question.reserved]
    picked: list[DomainQuestion] = []
    while len(picked) < amount:
        picked += draw.sample(own, len(own))
    return picked[:amount]


def _item(
    name: str,
    question: DomainQuestion,
    voices: Sequence[str],
    draw: random.Random,
    group: str,
    other: DomainQuestion | None,
) -> Item:
    """One that asks `question`, in two turns then what goes on from it, or an `other` one."""
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


def read_items(group: str, folder: Path = FOLDER) -> list[Item]:
    """The frozen items of a set, a key of SETS."""
    if group not in SETS:
        raise MossError(f"items {group!r}: unknown, there are {', '.join(SETS)}")
    return [Item.from_json(parse_object(line.content)) for line in read_lines(folder / f"{group}.jsonl")]


def write_items(folder: Path) -> None:
    """Writes what `make_items` makes, as files like the frozen ones."""
    for group, items in make_items().items():
        write_text(folder / f"{group}.jsonl", "".join(json.dumps(item.to_json()) + "\n" for item in items))


def synthesize_items(group: str, folder: Path, items: Sequence[Item]) -> list[dict[str, list[Path]]]:
    """Says items of a set into FOLDER/GROUP; what is there already is not said again.

    FOLDER/GROUP.jsonl is a manifest of what is asked (of the sentences: said), with its text.

    Returns:
        For each item {"questions": 16 kHz recordings, "answers": 24 kHz ones of the answering voice}, one a turn.
    """
    spoken = []
    lines = []
    (folder / group).mkdir(parents=True, exist_ok=True)
    for item in items:
        asker = (item.voice, item.words_per_minute, item.pitch)
        paths = {
            f"{use}s": [
                _spoken(folder, f"{group}/{item.name}-{use[0]}{turn}.wav", Utterance(text, *speaker, use))
                for turn, text in enumerate(texts)
            ]
            for use, speaker, texts in (("question", asker, item.questions), ("answer", ANSWER_SPEAKER, item.answers))
        }
        spoken.append(paths)
        said = zip(item.questions or item.answers, paths["questions"] or paths["answers"], strict=True)
        lines += [{"audio": str(path.relative_to(folder)), "text": text} for text, path in said]
    write_manifest(folder / f"{group}.jsonl", lines)
    return spoken


def _spoken(folder: Path, place: str, utterance: Utterance) -> Path:
    if not (folder / place).exists():
        synthesize(folder, place, utterance)
    return folder / place


if __name__ == "__main__":
    write_items(Path(sys.argv[1]))

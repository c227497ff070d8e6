"""A corpus of spoken facts, made from nothing: a small closed domain, written and spoken by espeak-ng.

    CORPUS/wav/*.wav
           text.jsonl, text-valid.jsonl                 facts and questions with answers, written
           speech.jsonl                                 a few facts in a row, spoken: text and the time of each word
           chat.jsonl, chat-valid.jsonl                 questions and answers, spoken and written, all four ways
           recordings.jsonl                             other recordings that were given, sound only
           pairs-valid.jsonl                            for `moss-jax eval pairs`: which answer is right
           questions-valid.jsonl                        for `moss-jax eval spoken-qa`: written and spoken questions

The others are manifests of `moss-jax tokenize`. Facts are sums, capitals and colours; the valid files hold phrasings
that the others do not.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moss_jax.audio import load_audio, save_audio
from moss_jax.checkpoint import atomic_folder
from moss_jax.data.espeak import speak
from moss_jax.errors import MossError
from moss_jax.files import output_lock
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT

VOICES = ("en-us", "en", "en-us+f2", "en-us+m3")  # of those who ask
ANSWERS = "en-us+klatt3"  # the voice that answers
FACTS = (1, 4)  # fewest and most in one recording
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Egypt": "Cairo",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "Norway": "Oslo",
    "Cuba": "Havana",
    "Peru": "Lima",
}
COLOURS = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "a lemon": "yellow",
    "an orange": "orange",
    "chocolate": "brown",
}
# The last phrasing of each kind is for the valid files.
PHRASINGS = {
    "sum": ("What is {0} plus {1}?", "How much is {0} and {1}?", "Please add {0} and {1}.", "Tell me {0} plus {1}."),
    "capital": ("What is the capital of {0}?", "Name the capital of {0}.", "Which city is the capital of {0}?"),
    "colour": ("What colour is {0}?", "Tell me the colour of {0}.", "Which colour has {0}?"),
}


@dataclass(frozen=True)
class Fact:
    kind: str  # one of PHRASINGS
    asked: tuple[str, ...]  # what a question about it names
    statement: str
    answer: str

    @property
    def word(self) -> str:
        """The answer in a word."""
        return self.answer.removeprefix("It is ").removesuffix(".")

    def question(self, phrasing: int) -> str:
        """Phrasings are counted from 0; -1 is the one kept for the valid files."""
        return PHRASINGS[self.kind][phrasing].format(*self.asked)


def facts() -> list[Fact]:
    """All of the domain: 81 sums, 10 capitals, 8 colours."""
    known = []
    for a in range(1, 10):
        for b in range(1, 10):
            one = NUMBERS[a]
            two = NUMBERS[b]
            three = NUMBERS[a + b]
            known.append(Fact("sum", (one, two), f"{one} plus {two} is {three}.".capitalize(), f"It is {three}."))
    for country, city in CAPITALS.items():
        known.append(Fact("capital", (country,), f"The capital of {country} is {city}.", f"It is {city}."))
    for thing, colour in COLOURS.items():
        known.append(Fact("colour", (thing,), f"{thing} is {colour}.".capitalize(), f"It is {colour}."))
    return known


def make_corpus(
    folder: str | Path,
    utterances: int = 200,
    seed: int = 0,
    recordings: Sequence[str | Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a corpus, whole or not at all.

    Args:
        folder: must not exist.
        utterances: recordings of facts, and as many conversations.
        recordings: other sound files that belong to it.
        progress: called with how many utterances are done, and of how many.

    Raises:
        MossError: espeak-ng is missing, the folder exists or cannot be written, a recording cannot be read.
    """
    if utterances < 1:
        raise MossError(f"utterances: {utterances}, expected at least 1")
    with output_lock(folder):
        if Path(folder).exists():
            raise MossError(f"{folder}: is there already, expected a new folder")
        _write_corpus(folder, utterances, seed, recordings, progress)


def _write_corpus(
    folder: str | Path,
    utterances: int,
    seed: int,
    recordings: Sequence[str | Path],
    progress: Callable[[int, int], None] | None,
) -> None:
    draw = random.Random(seed)
    known = facts()
    with atomic_folder(folder) as part:
        (part / "wav").mkdir()
        written = [{"text": fact.statement} for fact in known]
        written += [{"text": f"{fact.question(i)} {fact.answer}"} for fact in known for i in range(2)]
        write_manifest(part / "text.jsonl", written)
        write_manifest(part / "text-valid.jsonl", [{"text": f"{fact.question(-1)} {fact.answer}"} for fact in known])
        spoken = []
        chats = []
        valid = []
        for i in range(utterances):
            fact = draw.choice(known)
            several = " ".join(other.statement for other in draw.sample(known, draw.randint(*FACTS)))
            spoken.append(_said(part, f"fact-{i:05d}", several, _speaker(draw)))
            held = i % 10 == 0
            turns = _conversation(part, f"chat-{i:05d}", fact, -1 if held else draw.randrange(2), i, draw)
            (valid if held else chats).append({"turns": turns})
            if progress is not None:
                progress(i + 1, utterances)
        write_manifest(part / "speech.jsonl", spoken)
        write_manifest(part / "chat.jsonl", chats or valid)
        write_manifest(part / "chat-valid.jsonl", valid)
        if recordings:
            write_manifest(part / "recordings.jsonl", list(_copied(part, recordings)))
        draw = random.Random(f"evaluation {seed}")  # of its own, so that what is trained on stays the same
        questions = list(_questions(part, known, max(2, utterances // 10), draw))
        write_manifest(part / "questions-valid.jsonl", questions)
        write_manifest(part / "pairs-valid.jsonl", list(_pairs(part, known, questions, draw)))


def _questions(part: Path, known: Sequence[Fact], spoken: int, draw: random.Random) -> Iterator[dict]:
    """Every fact asked for in writing, some of them aloud as well."""
    for fact in known:
        yield {"question": fact.question(-1), "answers": [fact.word], "group": f"written, {fact.kind}"}
    for i, fact in enumerate(draw.sample(known, min(spoken, len(known)))):
        sound = _said(part, f"eval-{i:05d}-q", fact.question(-1), _speaker(draw))["audio"]
        yield {"question": {"audio": sound}, "answers": [fact.word], "group": "spoken"}


def _pairs(part: Path, known: Sequence[Fact], questions: Sequence[dict], draw: random.Random) -> Iterator[dict]:
    """The right answer to each question and that to another one of its kind, said as the question is."""
    right = {fact.word: fact for fact in known}
    for i, question in enumerate(questions):
        fact = right[question["answers"][0]]
        wrong = draw.choice([other for other in known if other.kind == fact.kind and other.answer != fact.answer])
        endings = [fact.answer, wrong.answer]
        if question["group"] == "spoken":
            endings = [
                {"audio": _said(part, f"eval-{i:05d}-{name}", text, (ANSWERS, 150, 50))["audio"]}
                for name, text in zip(("right", "wrong"), endings, strict=True)
            ]
        answer = draw.randrange(2)
        yield {
            "context": question["question"],
            "endings": endings[::-1] if answer else endings,
            "answer": answer,
            "group": question["group"],
        }


def _speaker(draw: random.Random) -> tuple[str, int, int]:
    return draw.choice(VOICES), draw.randrange(125, 190), draw.randrange(25, 75)


def _said(part: Path, name: str, text: str, speaker: tuple[str, int, int]) -> dict:
    """Writes the sound and returns its line of a manifest."""
    wave, rate, words = speak(text, *speaker)
    place = f"wav/{name}.wav"
    save_audio(part / place, wave, rate)
    return {"audio": place, "text": text, "words": [[word, round(a, 3), round(b, 3)] for word, a, b in words]}


def _conversation(part: Path, name: str, fact: Fact, phrasing: int, number: int, draw: random.Random) -> list[dict]:
    """The turns; whether question and answer are spoken goes round the four ways."""
    asked = number & 1
    answered = number & 2
    question = {"role": "user", "text": fact.question(phrasing)}
    if asked:
        question = {"role": "user", "audio": _said(part, f"{name}-q", question["text"], _speaker(draw))["audio"]}
    answer = {"role": "assistant", "text": fact.answer}
    if answered:
        answer = {"role": "assistant", "audio": _said(part, f"{name}-a", fact.answer, (ANSWERS, 150, 50))["audio"]}
    return [{"role": "system", "text": DEFAULT_SYSTEM_PROMPT["speech" if answered else "text"]}, question, answer]


def _copied(part: Path, recordings: Sequence[str | Path]) -> Iterator[dict]:
    for number, recording in enumerate(recordings):
        wave, rate = load_audio(recording)
        place = f"wav/recording-{number:03d}.wav"
        save_audio(part / place, wave, rate)
        yield {"audio": place}


def write_manifest(path: Path, lines: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

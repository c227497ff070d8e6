"""A small synthetic corpus of a closed domain (sums, capitals, colours), spoken by espeak-ng.

    CORPUS/wav/*.wav
           text.jsonl, text-valid.jsonl                 facts and questions with answers, written
           speech.jsonl                                 recordings of a few facts, with text and word times
           chat.jsonl, chat-valid.jsonl                 questions and answers in all four modality combinations
           recordings.jsonl                             other recordings that were given, without text
           pairs-valid.jsonl                            for `moss-jax eval pairs`: which answer is right
           questions-valid.jsonl                        for `moss-jax eval spoken-qa`: written and spoken questions

All but the last two are manifests of `moss-jax tokenize`. The -valid files have phrasings of questions that the others
do not have.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jax.audio import load_audio, save_audio
from moss_jax.data.espeak import speak
from moss_jax.errors import MossError
from moss_jax.files import atomic_folder, output_lock
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT

QUESTION_VOICES = ("en-us", "en", "en-us+f2", "en-us+m3")
ANSWER_SPEAKER = ("en-us+klatt3", 150, 50)  # voice, words per minute, pitch
WORDS_PER_MINUTE = (125, 190)  # range for questions
PITCH = (25, 75)  # range for questions
FACTS_PER_RECORDING = (1, 4)  # fewest and most
VALID_EVERY = 10  # one in so many conversations is for the valid file
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
# The last phrasing of each kind is held out for the -valid files.
PHRASINGS = {
    "sum": ("What is {0} plus {1}?", "How much is {0} and {1}?", "Please add {0} and {1}.", "Tell me {0} plus {1}."),
    "capital": ("What is the capital of {0}?", "Name the capital of {0}.", "Which city is the capital of {0}?"),
    "colour": ("What colour is {0}?", "Tell me the colour of {0}.", "Which colour has {0}?"),
}


@dataclass(frozen=True)
class Fact:
    kind: str  # one of PHRASINGS
    asked: tuple[str, ...]  # what its questions name, the arguments of the phrasings
    statement: str
    answer: str

    @property
    def word(self) -> str:
        """The answer as one word."""
        return self.answer.removeprefix("It is ").removesuffix(".")

    def question(self, phrasing: int) -> str:
        """The question in a phrasing of its kind; -1 is the held-out one."""
        return PHRASINGS[self.kind][phrasing].format(*self.asked)


def facts() -> list[Fact]:
    """All of the domain: 81 sums, 10 capitals, 8 colours."""
    known = []
    for a in range(1, 10):
        for b in range(1, 10):
            total = NUMBERS[a + b]
            statement = f"{NUMBERS[a]} plus {NUMBERS[b]} is {total}.".capitalize()
            known.append(Fact("sum", (NUMBERS[a], NUMBERS[b]), statement, f"It is {total}."))
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
        utterances: number of recordings of facts, and of conversations.
        recordings: other audio files to add.
        progress: called with (utterances done, utterances).

    Raises:
        MossError: espeak-ng is missing, the folder exists or cannot be written, or a recording cannot be read.
    """
    if utterances < 1:
        raise MossError(f"utterances: {utterances}, expected at least 1")
    with output_lock(folder):
        if Path(folder).exists():
            raise MossError(f"{folder}: already exists, expected a new folder")
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
        valid_chats = []
        for i in range(utterances):
            fact = draw.choice(known)
            statements = " ".join(other.statement for other in draw.sample(known, draw.randint(*FACTS_PER_RECORDING)))
            spoken.append(_synthesize(part, f"fact-{i:05d}", statements, _speaker(draw)))
            held_out = i % VALID_EVERY == 0
            turns = _conversation(part, f"chat-{i:05d}", fact, -1 if held_out else draw.randrange(2), i, draw)
            if held_out:
                valid_chats.append({"turns": turns})
            else:
                chats.append({"turns": turns})
            if progress is not None:
                progress(i + 1, utterances)
        write_manifest(part / "speech.jsonl", spoken)
        write_manifest(part / "chat.jsonl", chats or valid_chats)
        write_manifest(part / "chat-valid.jsonl", valid_chats)
        if recordings:
            write_manifest(part / "recordings.jsonl", list(_copied(part, recordings)))
        draw = random.Random(f"evaluation {seed}")  # separate, so that the training data does not depend on it
        questions = list(_questions(part, known, max(2, utterances // 10), draw))
        write_manifest(part / "questions-valid.jsonl", questions)
        write_manifest(part / "pairs-valid.jsonl", list(_pairs(part, known, questions, draw)))


def _questions(part: Path, known: Sequence[Fact], spoken: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """A written question about every fact, and spoken ones about some."""
    for fact in known:
        yield {"question": fact.question(-1), "answers": [fact.word], "group": f"written, {fact.kind}"}
    for i, fact in enumerate(draw.sample(known, min(spoken, len(known)))):
        audio = _synthesize(part, f"eval-{i:05d}-q", fact.question(-1), _speaker(draw))["audio"]
        yield {"question": {"audio": audio}, "answers": [fact.word], "group": "spoken"}


def _pairs(
    part: Path, known: Sequence[Fact], questions: Sequence[dict[str, Any]], draw: random.Random
) -> Iterator[dict[str, Any]]:
    """The right answer to each question and that to another one of its kind, written or spoken as the question is."""
    facts_by_word = {fact.word: fact for fact in known}
    for i, question in enumerate(questions):
        fact = facts_by_word[question["answers"][0]]
        wrong = draw.choice([other for other in known if other.kind == fact.kind and other.answer != fact.answer])
        endings: list[str | dict[str, str]] = [fact.answer, wrong.answer]
        if question["group"] == "spoken":
            endings = [
                {"audio": _synthesize(part, f"eval-{i:05d}-{name}", text, ANSWER_SPEAKER)["audio"]}
                for name, text in (("right", fact.answer), ("wrong", wrong.answer))
            ]
        answer = draw.randrange(2)
        yield {
            "context": question["question"],
            "endings": endings[::-1] if answer else endings,
            "answer": answer,
            "group": question["group"],
        }


def _speaker(draw: random.Random) -> tuple[str, int, int]:
    """Voice, words per minute and pitch of a question."""
    return draw.choice(QUESTION_VOICES), draw.randrange(*WORDS_PER_MINUTE), draw.randrange(*PITCH)


def _synthesize(part: Path, name: str, text: str, speaker: tuple[str, int, int]) -> dict[str, Any]:
    """Writes the recording and returns its manifest line."""
    wave, rate, words = speak(text, *speaker)
    path = f"wav/{name}.wav"
    save_audio(part / path, wave, rate)
    return {"audio": path, "text": text, "words": [[word, round(a, 3), round(b, 3)] for word, a, b in words]}


def _conversation(
    part: Path, name: str, fact: Fact, phrasing: int, number: int, draw: random.Random
) -> list[dict[str, Any]]:
    """The turns; consecutive numbers have question and answer spoken or written in all four combinations."""
    spoken_question = bool(number & 1)
    spoken_answer = bool(number & 2)
    question = {"role": "user", "text": fact.question(phrasing)}
    if spoken_question:
        audio = _synthesize(part, f"{name}-q", fact.question(phrasing), _speaker(draw))["audio"]
        question = {"role": "user", "audio": audio}
    answer = {"role": "assistant", "text": fact.answer}
    if spoken_answer:
        audio = _synthesize(part, f"{name}-a", fact.answer, ANSWER_SPEAKER)["audio"]
        answer = {"role": "assistant", "audio": audio}
    return [{"role": "system", "text": DEFAULT_SYSTEM_PROMPT["speech" if spoken_answer else "text"]}, question, answer]


def _copied(part: Path, recordings: Sequence[str | Path]) -> Iterator[dict[str, Any]]:
    for number, recording in enumerate(recordings):
        wave, rate = load_audio(recording)
        path = f"wav/recording-{number:03d}.wav"
        save_audio(part / path, wave, rate)
        yield {"audio": path}


def write_manifest(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

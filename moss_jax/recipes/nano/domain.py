"""The closed domain of nano: every fact, phrasing and voice, and which of them are held out for tests. Text only.

One phrasing of each kind and three voices are never trained on. Of the other questions one in eight is held out too (a
fact in one phrasing; the fact is trained in its other phrasings), and one answer in ten is never given to the speech
tokenizer and the decoder. What is held out is a function of the text alone, so that it is the same in every run.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from moss_jax.data.corpus import CAPITALS, NUMBERS
from moss_jax.data.corpus import COLOURS as MINIATURE_COLOURS

MAX_NUMBER = 20  # the largest number in questions and answers
MAX_FOLLOW_UP_STEP = 5  # the most that a second turn adds or subtracts
COLOURS = {"coffee" if thing == "chocolate" else thing: colour for thing, colour in MINIATURE_COLOURS.items()}
# Voices of questions in espeak-ng: accent and formant variant. The reserved ones are held out for tests.
VOICES = (
    "en-us",
    "en",
    "en-us+f1",
    "en-us+m3",
    "en+f2",
    "en-us+f5",
    "en+m1",
    "en-gb-scotland",
    "en-us-nyc+m2",
    "en-gb-x-rp+f4",
    "en-gb-x-gbcwmd+m5",
    "en-us+m6",
)
RESERVED_VOICES = ("en-us+f3", "en+m7", "en-gb-scotland+m4")
ANSWER_SPEAKER = ("en-us+klatt3", 150, 50)  # voice, words per minute, pitch
# Ranges for questions.
WORDS_PER_MINUTE = (125, 190)
PITCH = (25, 75)
# The last phrasing of each kind is held out for tests. All of its words occur in other phrasings.
PHRASINGS = {
    "sum": (
        "What is {0} plus {1}?",
        "How much is {0} plus {1}?",
        "What is {0} and {1}?",
        "Please add {0} and {1}.",
        "Tell me {0} plus {1}.",
        "What do you get when you add {0} and {1}?",
        "Can you add {0} and {1}?",
        "What is the sum of {0} and {1}?",
        "How much is {0} and {1}?",
        "{0} plus {1}, what is that?",
        "I want to know {0} plus {1}.",
        "Can you tell me what {0} plus {1} is?",
    ),
    "difference": (
        "What is {0} minus {1}?",
        "How much is {0} minus {1}?",
        "Please subtract {1} from {0}.",
        "Tell me {0} minus {1}.",
        "What do you get when you subtract {1} from {0}?",
        "Can you subtract {1} from {0}?",
        "What is the difference between {0} and {1}?",
        "Please take {1} from {0}.",
        "{0} minus {1}, what is that?",
        "I want to know {0} minus {1}.",
        "How much is left when you take {1} from {0}?",
        "Can you tell me what {0} minus {1} is?",
    ),
    "capital": (
        "What is the capital of {0}?",
        "Name the capital of {0}.",
        "Which city is the capital of {0}?",
        "Tell me the capital of {0}.",
        "Do you know the capital of {0}?",
        "Please name the capital of {0}.",
        "What is the capital city of {0}?",
        "I want to know the capital of {0}.",
        "What do you call the capital of {0}?",
        "The capital of {0}, what is that?",
        "How do you call the capital of {0}?",
        "Can you tell me what the capital of {0} is?",
    ),
    "colour": (
        "What colour is {0}?",
        "Tell me the colour of {0}.",
        "Which colour is {0}?",
        "What is the colour of {0}?",
        "Do you know the colour of {0}?",
        "Please name the colour of {0}.",
        "Name the colour of {0}.",
        "I want to know the colour of {0}.",
        "The colour of {0}, what is that?",
        "Which colour has {0}?",
        "Do you know which colour {0} is?",
        "Can you tell me what colour {0} is?",
    ),
    "greater": (
        "Is {0} greater than {1}?",
        "Is {0} more than {1}?",
        "Is {0} larger than {1}?",
        "Do you think {0} is greater than {1}?",
        "Tell me, is {0} greater than {1}?",
        "Would you say {0} is more than {1}?",
        "Can you tell me if {0} is larger than {1}?",
        "Please tell me if {0} is greater than {1}.",
        "I want to know if {0} is greater than {1}.",
        "Is it true that {0} is greater than {1}?",
        "Is the number {0} greater than {1}?",
        "Would you say {0} is greater than {1}?",
    ),
    "less": (
        "Is {0} less than {1}?",
        "Is {0} smaller than {1}?",
        "Is it true that {0} is less than {1}?",
        "Do you think {0} is less than {1}?",
        "Tell me, is {0} less than {1}?",
        "Would you say {0} is smaller than {1}?",
        "Can you tell me if {0} is smaller than {1}?",
        "Please tell me if {0} is less than {1}.",
        "I want to know if {0} is less than {1}.",
        "Do you know if {0} is less than {1}?",
        "Is the number {0} less than {1}?",
        "Would you say {0} is less than {1}?",
    ),
    "digits": (
        "Say {0} {1} {2}.",
        "Repeat {0} {1} {2}.",
        "Please say {0} {1} {2}.",
        "Please repeat {0} {1} {2}.",
        "Say the digits {0} {1} {2}.",
        "Repeat the digits {0} {1} {2}.",
        "Read back {0} {1} {2}.",
        "Please read back {0} {1} {2}.",
        "Can you say {0} {1} {2}?",
        "Can you repeat {0} {1} {2}?",
        "Repeat after me, {0} {1} {2}.",
        "Please read back the digits {0} {1} {2}.",
    ),
    "greeting": (
        "Hello.",
        "Hi.",
        "Good morning.",
        "Good evening.",
        "Hello there.",
        "Hi there.",
        "Good day.",
        "Good afternoon.",
        "Hello, good morning.",
        "Hi, good day.",
        "Hello, good evening.",
    ),
    "wellbeing": (
        "How are you?",
        "How are you today?",
        "How do you do?",
        "How is it going?",
        "Are you well?",
        "Are you well today?",
        "How are you doing?",
        "Hello, how are you?",
        "Tell me how you are.",
        "How is it going today?",
        "How are you doing today?",
    ),
    "thanks": (
        "Thank you.",
        "Thanks.",
        "Thank you very much.",
        "Thanks a lot.",
        "Many thanks.",
        "Thank you so much.",
        "I thank you.",
        "Great, thank you.",
        "Great, thanks.",
        "That is great, thank you.",
        "Great, many thanks.",
    ),
    "goodbye": (
        "Goodbye.",
        "Bye.",
        "Bye bye.",
        "See you later.",
        "See you soon.",
        "Goodbye for now.",
        "Bye for now.",
        "I have to go now.",
        "Good night.",
        "See you.",
        "Bye, see you soon.",
    ),
    "name": (
        "What is your name?",
        "Tell me your name.",
        "Who are you?",
        "Do you have a name?",
        "What do you call yourself?",
        "Please tell me your name.",
        "I want to know your name.",
        "Say your name.",
        "Please say your name.",
        "Tell me who you are.",
        "Can you tell me your name?",
    ),
}
# Phrasings for training only. Without them the model learns a question as one of eleven whole sentences and takes a new
# one for the nearest of these; with them a reserved phrasing is a new combination of known parts.
MORE_PHRASINGS = {
    "sum": (
        "Do you know what {0} plus {1} is?",
        "Tell me what {0} plus {1} is.",
        "Can you tell me how much {0} plus {1} is?",
        "Please tell me what {0} and {1} is.",
        "I want to know what {0} plus {1} is.",
        "Add {0} and {1}.",
        "Do you know how much {0} and {1} is?",
        "Can you say what {0} and {1} is?",
        "Name the sum of {0} and {1}.",
        "Can you tell me the sum of {0} and {1}?",
        "Would you say what {0} plus {1} is?",
        "And what is {0} plus {1}?",
        "Tell me, how much is {0} plus {1}?",
    ),
    "difference": (
        "Do you know what {0} minus {1} is?",
        "Tell me what {0} minus {1} is.",
        "Can you tell me how much {0} minus {1} is?",
        "Please tell me what is left when you take {1} from {0}.",
        "I want to know what {0} minus {1} is.",
        "Subtract {1} from {0}.",
        "Do you know how much {0} minus {1} is?",
        "Can you say what {0} minus {1} is?",
        "Name the difference between {0} and {1}.",
        "Can you tell me the difference between {0} and {1}?",
        "Would you say what {0} minus {1} is?",
        "And what is {0} minus {1}?",
        "Tell me, how much is {0} minus {1}?",
    ),
    "capital": (
        "Do you know what the capital of {0} is?",
        "Tell me what the capital of {0} is.",
        "Can you tell me the capital of {0}?",
        "Can you tell me which city the capital of {0} is?",
        "I want to know what the capital of {0} is.",
        "Can you name the capital of {0}?",
        "Please tell me what the capital city of {0} is.",
        "Say the capital of {0}.",
        "And what is the capital of {0}?",
        "Would you say what the capital of {0} is?",
    ),
    "colour": (
        "Do you know what colour {0} is?",
        "Tell me what colour {0} is.",
        "Can you tell me the colour of {0}?",
        "Can you tell me which colour {0} is?",
        "I want to know what colour {0} is.",
        "Can you name the colour of {0}?",
        "Please tell me what the colour of {0} is.",
        "Say the colour of {0}.",
        "And what colour is {0}?",
        "Would you say what colour {0} is?",
    ),
    "greater": (
        "Do you know if {0} is greater than {1}?",
        "Tell me if {0} is greater than {1}.",
        "Can you tell me if {0} is more than {1}?",
        "Can you say if {0} is greater than {1}?",
        "Is it true that {0} is larger than {1}?",
        "Would you say the number {0} is greater than {1}?",
        "Do you think that {0} is more than {1}?",
        "Would you say that {0} is larger than {1}?",
        "Please say if {0} is greater than {1}.",
        "And is {0} greater than {1}?",
    ),
    "less": (
        "Do you know if {0} is smaller than {1}?",
        "Tell me if {0} is less than {1}.",
        "Can you tell me if {0} is less than {1}?",
        "Can you say if {0} is less than {1}?",
        "Is it true that {0} is smaller than {1}?",
        "Would you say the number {0} is less than {1}?",
        "Do you think that {0} is smaller than {1}?",
        "Would you say that {0} is smaller than {1}?",
        "Please say if {0} is less than {1}.",
        "And is {0} less than {1}?",
    ),
    "digits": (
        "Read the digits {0} {1} {2}.",
        "Please repeat the digits {0} {1} {2}.",
        "Please say the digits {0} {1} {2}.",
        "Can you read back {0} {1} {2}?",
        "Can you repeat the digits {0} {1} {2}?",
        "Now say {0} {1} {2}.",
        "Can you say the digits {0} {1} {2}?",
        "Tell me the digits {0} {1} {2}.",
        "Please repeat after me, {0} {1} {2}.",
    ),
    "greeting": ("Hello, good day.", "Hi, good morning.", "Good morning to you.", "Hello, good afternoon."),
    "wellbeing": ("How are you now?", "Tell me, how are you?", "Hi, how are you?", "How is it going now?"),
    "thanks": ("Great, thank you very much.", "Many thanks to you.", "Thanks, that is great.", "Great, I thank you."),
    "goodbye": ("Goodbye, see you later.", "Bye, see you later.", "Goodbye, see you soon.", "Good night, goodbye."),
    "name": (
        "Do you know your name?",
        "Can you say your name?",
        "I want to know who you are.",
        "Can you tell me who you are?",
    ),
}
SOCIAL = {
    "greeting": "Hello, how can I help you?",
    "wellbeing": "I am fine, thank you.",
    "thanks": "You are welcome.",
    "goodbye": "Goodbye, have a nice day.",
    "name": "My name is Moss.",
}
# Second turns, which refer to the answer before.
FOLLOW_UPS = {
    "plus": (
        "And plus {0}?",
        "Plus {0}?",
        "Now add {0}.",
        "And now plus {0}?",
        "Add {0} to that.",
        "Please add {0}.",
        "What is that plus {0}?",
        "How much is that plus {0}?",
        "Tell me that plus {0}.",
        "And if you add {0}?",
        "And what is that plus {0}?",
    ),
    "minus": (
        "And minus {0}?",
        "Minus {0}?",
        "Now subtract {0}.",
        "And now minus {0}?",
        "Subtract {0} from that.",
        "Please subtract {0}.",
        "What is that minus {0}?",
        "How much is that minus {0}?",
        "Tell me that minus {0}.",
        "And if you subtract {0}?",
        "And what is that minus {0}?",
    ),
    "other": (
        "And {0}?",
        "And of {0}?",
        "What about {0}?",
        "And what about {0}?",
        "Now {0}.",
        "And now {0}?",
        "How about {0}?",
        "And how about {0}?",
        "Now tell me of {0}.",
        "The same for {0}.",
        "And the same for {0}?",
    ),
    "again": (
        "Again.",
        "Again, please.",
        "Say that again.",
        "Please say that again.",
        "Repeat that.",
        "Please repeat that.",
        "Once more.",
        "Once more, please.",
        "Can you say that again?",
        "Can you repeat that?",
        "Can you repeat that again?",
    ),
}
RESERVED_PHRASING = -1  # index of the held-out phrasing
HELD_OUT_QUESTIONS = 1 / 8  # share of the questions in trained phrasings
HELD_OUT_ANSWERS = 1 / 10  # share of the answers with numbers


@dataclass(frozen=True)
class Fact:
    kind: str  # one of PHRASINGS
    asked: tuple[str, ...]  # what its questions name, the arguments of the phrasings
    answer: str  # a sentence
    result: int | None = None  # of a sum or a difference

    def question(self, phrasing: str) -> str:
        return sentence(phrasing.format(*self.asked))


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


@lru_cache(maxsize=1)
def facts() -> tuple[Fact, ...]:
    """All of the domain: 231 sums, 231 differences, 10 capitals, 8 colours, 840 comparisons, 1000 digits, 5 social."""
    numbers = range(MAX_NUMBER + 1)
    known = [_sum(a, b) for a in numbers for b in numbers if a + b <= MAX_NUMBER]
    known += [_difference(a, b) for a in numbers for b in numbers if b <= a]
    known += [Fact("capital", (country,), f"The capital of {country} is {city}.") for country, city in CAPITALS.items()]
    known += [Fact("colour", (thing,), sentence(f"{thing} is {colour}.")) for thing, colour in COLOURS.items()]
    for kind in ("greater", "less"):
        for a in numbers:
            for b in numbers:
                if a != b:
                    yes = (a > b) == (kind == "greater")
                    truth = f"{NUMBERS[a]} is {'greater' if a > b else 'less'} than {NUMBERS[b]}."
                    known.append(Fact(kind, (NUMBERS[a], NUMBERS[b]), f"{'Yes' if yes else 'No'}, {truth}"))
    for number in range(1000):
        digits = tuple(NUMBERS[int(digit)] for digit in f"{number:03d}")
        known.append(Fact("digits", digits, f"You said {' '.join(digits)}."))
    known += [Fact(kind, (), answer) for kind, answer in SOCIAL.items()]
    return tuple(known)


def _sum(a: int, b: int) -> Fact:
    answer = sentence(f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}.")
    return Fact("sum", (NUMBERS[a], NUMBERS[b]), answer, a + b)


def _difference(a: int, b: int) -> Fact:
    answer = sentence(f"{NUMBERS[a]} minus {NUMBERS[b]} is {NUMBERS[a - b]}.")
    return Fact("difference", (NUMBERS[a], NUMBERS[b]), answer, a - b)


@dataclass(frozen=True)
class DomainQuestion:
    """A fact asked in one phrasing."""

    fact: Fact
    phrasing: str

    @property
    def text(self) -> str:
        return self.fact.question(self.phrasing)

    @property
    def reserved(self) -> bool:
        """Whether its phrasing is held out for tests."""
        return self.phrasing == PHRASINGS[self.fact.kind][RESERVED_PHRASING]

    @property
    def held_out(self) -> bool:
        """Whether it is held out for tests. A social turn has nothing but its phrasing, so only the reserved one is."""
        if self.reserved:
            return True
        return self.fact.kind not in SOCIAL and _hash_fraction(f"question {self.text}") < HELD_OUT_QUESTIONS


@lru_cache(maxsize=1)
def questions() -> tuple[DomainQuestion, ...]:
    """Every fact in every one of its PHRASINGS."""
    return tuple(DomainQuestion(fact, phrasing) for fact in facts() for phrasing in PHRASINGS[fact.kind])


@lru_cache(maxsize=1)
def trained_questions() -> tuple[DomainQuestion, ...]:
    """Every fact in every phrasing that may be trained on, of PHRASINGS and of MORE_PHRASINGS."""
    return tuple(
        question
        for fact in facts()
        for phrasing in (*PHRASINGS[fact.kind], *MORE_PHRASINGS[fact.kind])
        if not (question := DomainQuestion(fact, phrasing)).held_out
    )


@dataclass(frozen=True)
class FollowUp:
    """A second turn and its right answer."""

    kind: str  # one of FOLLOW_UPS
    text: str
    answer: str


def follow_ups(fact: Fact, reserved: bool) -> Iterator[FollowUp]:
    """The second turns that make sense after the answer to `fact`, in the reserved phrasing or in the other ones."""

    def phrased(kind: str, asked: tuple[str, ...], answer: str) -> Iterator[FollowUp]:
        for phrasing in FOLLOW_UPS[kind][RESERVED_PHRASING:] if reserved else FOLLOW_UPS[kind][:RESERVED_PHRASING]:
            yield FollowUp(kind, sentence(phrasing.format(*asked)), answer)

    if fact.result is not None:
        for step in range(1, MAX_FOLLOW_UP_STEP + 1):
            if fact.result + step <= MAX_NUMBER:
                yield from phrased("plus", (NUMBERS[step],), _sum(fact.result, step).answer)
            if fact.result >= step:
                yield from phrased("minus", (NUMBERS[step],), _difference(fact.result, step).answer)
    elif fact.kind in ("capital", "colour"):
        for other in facts():
            if other.kind == fact.kind and other != fact:
                yield from phrased("other", other.asked, other.answer)
    elif fact.kind == "digits":
        yield from phrased("again", (), fact.answer)


@lru_cache(maxsize=1)
def answers() -> tuple[str, ...]:
    """Every answer of the domain, each once."""
    return tuple(dict.fromkeys(fact.answer for fact in facts()))


def answer_is_held_out(text: str) -> bool:
    """Whether the speech tokenizer and the decoder are not trained on this answer. Only answers with numbers, of which
    there are many, are held out."""
    if text in SOCIAL.values() or any(text == fact.answer for fact in facts() if fact.kind in ("capital", "colour")):
        return False
    return _hash_fraction(f"answer {text}") < HELD_OUT_ANSWERS


def draw_speaker(draw: random.Random, voices: tuple[str, ...] = VOICES) -> tuple[str, int, int]:
    """The speaker of a question: voice, words per minute, pitch."""
    return draw.choice(voices), draw.randint(*WORDS_PER_MINUTE), draw.randint(*PITCH)


def _hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48

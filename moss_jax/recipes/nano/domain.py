"""The closed domain that nano is trained on: every fact, every phrasing, every voice, and which of them are kept for
tests. Text alone; nothing here makes a sound.

A phrasing of each kind and three voices are never trained on. Of the other questions one in eight is kept as well (a
fact in one phrasing; the fact itself is trained in its other phrasings), and one answer in ten is never given to the
speech tokenizer and the decoder. What is kept is a function of the text alone, so that every run keeps the same.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from moss_jax.data.corpus import CAPITALS, NUMBERS
from moss_jax.data.corpus import COLOURS as MINIATURE_COLOURS

MAX_NUMBER = 20  # no number in a question or an answer is above it
MAX_FOLLOW_UP_STEP = 5  # the most that a second turn adds or takes away
COLOURS = {"coffee" if thing == "chocolate" else thing: colour for thing, colour in MINIATURE_COLOURS.items()}
# Voices of espeak-ng that ask, accent and formants; the last three are kept for tests.
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
ANSWER_SPEAKER = ("en-us+klatt3", 150, 50)  # the voice that answers: name, words a minute, pitch
# of those who ask
WORDS_PER_MINUTE = (125, 190)
PITCH = (25, 75)
# The last phrasing of each kind is kept for tests. It has no word of its own.
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
# More of them, for training alone: without them a question is learnt as one of eleven whole sentences, and a new
# one is heard as the nearest. They make a reserved phrasing a new join of known parts, where they have its parts.
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
# Second turns. What they speak of is what was answered before.
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
RESERVED_PHRASING = -1  # of the phrasings


@dataclass(frozen=True)
class Fact:
    kind: str  # one of PHRASINGS
    asked: tuple[str, ...]  # what a question about it names
    answer: str  # a sentence
    result: int | None = None  # of a sum or a difference

    def question(self, phrasing: str) -> str:
        return sentence(phrasing.format(*self.asked))


def sentence(text: str) -> str:
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
    one = NUMBERS[a]
    two = NUMBERS[b]
    three = NUMBERS[a + b]
    return Fact("sum", (one, two), sentence(f"{one} plus {two} is {three}."), a + b)


def _difference(a: int, b: int) -> Fact:
    one = NUMBERS[a]
    two = NUMBERS[b]
    three = NUMBERS[a - b]
    return Fact("difference", (one, two), sentence(f"{one} minus {two} is {three}."), a - b)


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
        """Whether its phrasing is kept for tests."""
        return self.phrasing == PHRASINGS[self.fact.kind][RESERVED_PHRASING]

    @property
    def held_out(self) -> bool:
        """Whether it is for tests. A social turn has no question beside its phrasing, so that only the reserved is."""
        return self.reserved or (self.fact.kind not in SOCIAL and _share(f"question {self.text}") < 1 / 8)


@lru_cache(maxsize=1)
def questions() -> tuple[DomainQuestion, ...]:
    """Every fact in every one of its PHRASINGS."""
    return tuple(DomainQuestion(fact, phrasing) for fact in facts() for phrasing in PHRASINGS[fact.kind])


@lru_cache(maxsize=1)
def trained_questions() -> tuple[DomainQuestion, ...]:
    """Every fact in every phrasing in which it may be asked in training, of PHRASINGS and of MORE_PHRASINGS."""
    return tuple(
        question
        for fact in facts()
        for phrasing in (*PHRASINGS[fact.kind], *MORE_PHRASINGS[fact.kind])
        if not (question := DomainQuestion(fact, phrasing)).held_out
    )


@dataclass(frozen=True)
class FollowUp:
    """A second turn, and what is right to answer."""

    kind: str  # one of FOLLOW_UPS
    text: str
    answer: str


def follow_ups(fact: Fact, reserved: bool) -> Iterator[FollowUp]:
    """The second turns that make sense after the answer to `fact`, in the reserved phrasing or in the others."""

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
    """Every answer there is, each once."""
    return tuple(dict.fromkeys(fact.answer for fact in facts()))


def answer_is_held_out(text: str) -> bool:
    """Whether the speech tokenizer and the decoder never hear this answer in training: one in ten of the numbers'."""
    plenty = text not in SOCIAL.values() and not any(
        text == fact.answer for fact in facts() if fact.kind in ("capital", "colour")
    )
    return plenty and _share(f"answer {text}") < 1 / 10


def draw_speaker(draw: random.Random, voices: tuple[str, ...] = VOICES) -> tuple[str, int, int]:
    """Who asks: voice, words a minute, pitch."""
    return draw.choice(voices), draw.randint(*WORDS_PER_MINUTE), draw.randint(*PITCH)


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48

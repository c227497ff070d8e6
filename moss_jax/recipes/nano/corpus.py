"""Nano's corpus, made from nothing with espeak-ng: manifests and sound for every step of the recipe.

    CORPUS/tokenizer.jsonl, tokenizer-valid.jsonl   speech tokenizer: all voices, sound with text and word times
           decoder.jsonl, decoder-valid.jsonl       decoder: the answering voice, 24 kHz
           text.jsonl, text-valid.jsonl             facts as statements, and questions with their answers
           interleaved.jsonl                        several facts in a row with word times; answering and asking voices
           asr.jsonl, tts.jsonl                     questions, answers, rows of words to write down; answers to say
           chat.jsonl, chat-valid.jsonl             questions and answers, spoken and written, all four ways; more turns
           text_tokenizer.json                      a text tokenizer of the domain's words
           about.json                               what was asked for, hours and counts

Every manifest is in the order of a draw, so that its first lines are a fair sample. What `domain` keeps for tests is in
none of them: no reserved voice, no reserved phrasing, no question that is kept. Of the answers that are kept the LM's
manifests hold the sound, tokenizer.jsonl and decoder.jsonl do not.
"""

import json
import multiprocessing
import os
import random
import re
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from moss_jax.audio.wave import resample, save_audio
from moss_jax.checkpoint import write_text
from moss_jax.data.corpus import write_manifest
from moss_jax.data.espeak import speak
from moss_jax.documents import parse_object, read_json, read_lines
from moss_jax.errors import MossError
from moss_jax.files import output_lock
from moss_jax.recipes.nano import domain
from moss_jax.recipes.nano.domain import ANSWERS, FOLLOW_UPS, PHRASINGS, RESERVED, SOCIAL, Fact, FollowUp, Question
from moss_jax.text.byte_level import byte_level, learn_merges
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT

RATES = {"question": 16000, "answer": 24000}  # Hz: only the speech tokenizer hears questions, the decoder says answers
CHUNK = 100  # utterances that are made, and made again when interrupted, together
# Spoken questions of each kind, at scale 1.
AMOUNTS = {
    "sum": 2200,
    "difference": 2200,
    "greater": 1200,
    "less": 1200,
    "digits": 2000,
    "capital": 500,
    "colour": 400,
    "greeting": 80,
    "wellbeing": 80,
    "thanks": 80,
    "goodbye": 80,
    "name": 80,
}
# of two turns; of several facts; sentences of no answer. At scale 1
DIALOGUES = 2400
DOCUMENTS = 800
EXTRAS = 500
# Conversations that change their subject, joined of what is said for the others. At scale 1; the fewest and most that
# are joined; rows that one may have in the language model, and of these a turn's own and a second's of speech.
TALKS = 3000
TALK_PARTS = (2, 4)
TALK_ROWS = 220
TURN_ROWS = 6
SECOND_ROWS = 12.5
# Rows of words in no order: who only ever hears twelve phrasings of a question learns them whole, not their words.
# at scale 1; fewest and most words in one
ROWS = 3200
ROW_WORDS = (3, 8)
ALL_ANSWERS = 0.1  # from this scale on every answer is said; below it a share of them and those to what is asked
OFTEN = 15  # times that an answer without numbers, of which there are few, is in the manifests of single sentences
# Questions in text.jsonl; of the other kinds all.
WRITTEN = {"sum": 2500, "difference": 2500, "digits": 2500, "greater": 3000, "less": 3000}
VALID = 0.03  # of what is drawn is for the valid manifests
# Those who ask are played so much slower and faster, which moves pitch and formants: twelve voices become more
# (Ko et al., Interspeech 2015, "Audio augmentation for speech recognition").
SPEEDS = tuple(round(0.9 + 0.02 * number, 2) for number in range(11))
# Where they ask: half of them are quieter or louder (dB), in noise (dB that speech is above it), with pauses (seconds
# at each end) as a recording has them; the others are what espeak-ng says and nothing else.
ROOMS = 1 / 2
LEVELS = (-18.0, 6.0)
ABOVE_NOISE = (25.0, 60.0)
PAUSES = (0.0, 0.2)
WAYS = ("ss", "st", "ts", "tt")  # question and answer, spoken or written
# Fields of the transformer's config that this text tokenizer wants.
TEXT_IDS = {
    "text_vocab_size": 800,
    "endoftext_id": 768,
    "im_start_id": 769,
    "im_end_id": 770,
    "sosp_id": 771,
    "modality_pad_id": 792,
}
Said = dict[str, object]  # a line of a manifest: audio, text, words


@dataclass(frozen=True)
class Room:
    """How something is recorded: dB louder, dB that speech is above the noise, seconds before and after it."""

    level: float
    above_noise: float
    before: float = 0.0
    after: float = 0.0

    def record(self, wave: np.ndarray, rate: int, seed: int) -> np.ndarray:
        """Sound float32 [samples] as it is recorded there; the noise is between white and low, as the seed says."""
        draw = np.random.default_rng(seed)
        pauses = round(self.before * rate), round(self.after * rate)
        samples = len(wave) + sum(pauses)
        low = draw.uniform(0, 0.95) ** np.arange(64)  # a low-pass of one pole, as far as it is heard
        noise = np.convolve(draw.standard_normal(samples), low)[:samples]
        loud = np.sqrt(np.mean(np.square(wave)))
        noise *= loud * 10 ** (-self.above_noise / 20) / np.std(noise)
        return np.clip((np.pad(wave, pauses) + noise) * 10 ** (self.level / 20), -1, 1).astype(np.float32)


@dataclass(frozen=True)
class Utterance:
    """What is to be said, by whom, and as what: a key of RATES."""

    text: str
    voice: str
    words_per_minute: int
    pitch: int
    use: str
    speed: float = 1.0  # of playing what was said: above 1 shorter, higher, and of a smaller speaker
    room: Room | None = None


@dataclass(frozen=True)
class Dialogue:
    """A question with its answer, and perhaps a second turn; places are in the plan's utterances."""

    question: Question
    asked: int
    second: FollowUp | None = None
    asked_second: int | None = None


@dataclass(frozen=True)
class Plan:
    """All that a corpus holds, before anything is said; a function of seed and scale alone."""

    utterances: list[Utterance]
    answers: dict[str, int]  # text -> place
    extras: list[int]  # the answering voice saying what is no answer
    rows: list[int]  # those who ask, saying words in no order
    singles: list[Dialogue]
    doubles: list[Dialogue]
    documents: list[int]
    talks: int  # so many are joined
    valid: int  # so many of the first singles and doubles (each), extras and documents are for the valid manifests


def make_plan(seed: int = 0, scale: float = 1.0) -> Plan:
    """What to say. At scale 1 about nine hours, of which one and a half are the answering voice."""
    draw = random.Random(f"nano corpus {seed}")
    utterances: list[Utterance] = []

    def add(utterance: Utterance) -> int:
        utterances.append(utterance)
        return len(utterances) - 1

    def question(text: str) -> Utterance:
        return Utterance(text, *domain.speaker(draw), "question", draw.choice(SPEEDS), _room(draw))

    def ask(text: str) -> int:
        return add(question(text))

    def answer(text: str) -> int:
        return add(Utterance(text, *ANSWERS, "answer"))

    def count(amount: int) -> int:
        return max(2, round(amount * scale))

    answers = {text: answer(text) for text in domain.answers()}
    singles = [
        Dialogue(asked, ask(asked.text))
        for kind, amount in AMOUNTS.items()
        for asked in _asked(kind, count(amount), draw)
    ]
    draw.shuffle(singles)
    doubles = []
    going_on = [dialogue for dialogue in singles if dialogue.question.fact.kind not in (*SOCIAL, "greater", "less")]
    for first in draw.choices(going_on, k=count(DIALOGUES)):
        second = draw.choice(list(domain.follow_ups(first.question.fact, reserved=False)))
        asked_second = add(replace(utterances[first.asked], text=second.text))
        doubles.append(Dialogue(first.question, first.asked, second, asked_second))
    documents = []
    for number in range(count(DOCUMENTS)):
        facts = draw.sample(domain.facts(), draw.randint(2, 5))
        if number % 2:  # somebody asks and answers
            parts = [f"{_trained(fact, draw).text} {fact.answer}" for fact in facts[:3]]
            documents.append(ask(" ".join(parts)))
        else:
            documents.append(answer(" ".join(fact.answer for fact in facts)))
    extras = [answer(text) for text in _other_sentences(count(EXTRAS), draw)]
    # A row that is a question is left out after its draw: nothing else of the plan depends on it.
    questions = {asked.text for asked in domain.questions()}
    rows = [add(row) for row in map(question, _rows(count(ROWS), draw)) if row.text not in questions]
    valid = max(1, round(VALID * len(singles)))
    plan = Plan(utterances, answers, extras, rows, singles, doubles, documents, count(TALKS), valid)
    if scale >= ALL_ANSWERS:
        return plan
    wanted = {dialogue.question.fact.answer for dialogue in (*singles, *doubles)}
    wanted |= {dialogue.second.answer for dialogue in doubles}
    return _with_answers(plan, wanted | set(draw.sample(list(answers), count(len(answers) / ALL_ANSWERS))))


def _with_answers(plan: Plan, wanted: Collection[str]) -> Plan:
    """The plan with these answers only."""
    answers = {text: place for text, place in plan.answers.items() if text in wanted}
    others = sorted(set(range(len(plan.utterances))) - set(plan.answers.values()))
    old = [*answers.values(), *others]
    places = {place: number for number, place in enumerate(old)}

    def dialogue(of: Dialogue) -> Dialogue:
        second = None if of.asked_second is None else places[of.asked_second]
        return replace(of, asked=places[of.asked], asked_second=second)

    return replace(
        plan,
        utterances=[plan.utterances[place] for place in old],
        answers={text: places[place] for text, place in answers.items()},
        extras=[places[place] for place in plan.extras],
        rows=[places[place] for place in plan.rows],
        singles=[dialogue(of) for of in plan.singles],
        doubles=[dialogue(of) for of in plan.doubles],
        documents=[places[place] for place in plan.documents],
    )


def _asked(kind: str, amount: int, draw: random.Random) -> Iterator[Question]:
    """So many questions of a kind; every fact as often as the others."""
    facts = [fact for fact in domain.facts() if fact.kind == kind]
    order: list[Fact] = []
    while len(order) < amount:
        order += draw.sample(facts, len(facts))
    for fact in order[:amount]:
        yield _trained(fact, draw)


def _trained(fact: Fact, draw: random.Random) -> Question:
    """A question about a fact that is not kept for tests."""
    return draw.choice(_trained_questions()[fact])


@lru_cache(maxsize=1)
def _trained_questions() -> dict[Fact, list[Question]]:
    found: dict[Fact, list[Question]] = {}
    for question in domain.trained_questions():
        found.setdefault(question.fact, []).append(question)
    return found


def _other_sentences(amount: int, draw: random.Random) -> list[str]:
    """Sentences that are no answers, for the decoder: longer rows of digits, what is not so, questions."""
    capitals = domain.CAPITALS
    colours = domain.COLOURS
    untrue = [
        f"The capital of {x} is not {city}." for x in capitals for city in capitals.values() if city != capitals[x]
    ]
    untrue += [f"{x} is not {c}." for x in colours for c in dict.fromkeys(colours.values()) if c != colours[x]]
    found: dict[str, None] = dict.fromkeys(draw.sample(untrue, min(len(untrue), amount // 4)))
    while len(found) < amount:
        digits = f"{' '.join(draw.choices(domain.NUMBERS, k=draw.randint(3, 7)))}."
        found[draw.choice((digits, _trained(draw.choice(domain.facts()), draw).text))] = None
    return [domain.sentence(text) for text in draw.sample(list(found), len(found))]


def _room(draw: random.Random) -> Room | None:
    if draw.random() >= ROOMS:
        return None
    ranges = LEVELS, ABOVE_NOISE, PAUSES, PAUSES
    return Room(*(round(draw.uniform(*values), 2) for values in ranges))


def _rows(amount: int, draw: random.Random) -> Iterator[str]:
    """Words of the domain in no order, half of them numbers and names; a word begins a row as it begins a phrasing."""
    phrased = [
        re.sub(r"{\d}", "", phrasing).split()
        for phrasings in (*PHRASINGS.values(), *FOLLOW_UPS.values())
        for phrasing in phrasings[:RESERVED]
    ] + [answer.split() for answer in SOCIAL.values()]
    first = sorted({words[0].strip(",.?") for words in phrased if words[0][0].isupper()})
    later = sorted({word.strip(",.?") for words in phrased for word in words[1:]} - {""})
    numbers = domain.NUMBERS[: domain.MOST + 1]
    names = [*domain.CAPITALS, *domain.CAPITALS.values()]
    things = [*domain.COLOURS, *domain.COLOURS.values()]
    kept = {question.text for question in domain.questions() if question.kept}
    while amount:
        row = [
            draw.choice(draw.choices((later, numbers, names, things), (8, 6, 1, 1))[0])
            for _ in range(draw.randint(*ROW_WORDS))
        ]
        row[0] = draw.choice((draw.choice(first), draw.choice(numbers)))
        text = domain.sentence(f"{' '.join(row)}.")
        if text not in kept:
            amount -= 1
            yield text


def make_nano_corpus(
    folder: str | Path,
    scale: float = 1.0,
    seed: int = 0,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the corpus. Until it is whole it lies in FOLDER.part, where the same command goes on after it was stopped.

    Args:
        folder: must not exist.
        scale: how much is said, of the released recipe's amounts; from ALL_ANSWERS on all answers are.
        processes: that speak side by side; None for one a core.
        progress: called with how many utterances are there, and of how many.

    Raises:
        MossError: espeak-ng is missing, the folder exists, FOLDER.part is of another seed or scale, another process
            makes this corpus, or the place cannot be written.
    """
    folder = Path(folder)
    if not 0 < scale <= 100:
        raise MossError(f"scale is {scale:g}, expected a number above 0, at most 100")
    with output_lock(folder):
        if folder.exists():
            raise MossError(f"{folder}: is there already, expected a new folder")
        _write_corpus(folder, scale, seed, processes, progress)


def _write_corpus(
    folder: Path, scale: float, seed: int, processes: int | None, progress: Callable[[int, int], None] | None
) -> None:
    plan = make_plan(seed, scale)
    part = folder.with_name(folder.name + ".part")
    _begin(part, {"seed": seed, "scale": scale, "utterances": len(plan.utterances)})
    said = _say_all(part, plan.utterances, processes or os.cpu_count() or 1, progress)
    _write_manifests(part, plan, said, random.Random(f"nano manifests {seed}"))
    write_text(part / "text_tokenizer.json", text_tokenizer(plan))
    for journal in part.glob("wav/*/said.jsonl"):
        journal.unlink()
    os.rename(part, folder)


def _begin(part: Path, about: dict) -> None:
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MossError(f"{part}: cannot be written ({error.strerror})") from error
    path = part / "about.json"
    if path.exists():
        found = read_json(path)
        if any(found.get(key) != value for key, value in about.items()):
            raise MossError(f"{part}: is there already, of another seed or scale; remove it or choose another folder")
    write_text(path, json.dumps(about, indent=1) + "\n")


def _say_all(
    part: Path, utterances: Sequence[Utterance], processes: int, progress: Callable[[int, int], None] | None
) -> list[Said]:
    """The lines of all utterances; chunks that were made before are read."""
    chunks = [range(first, min(first + CHUNK, len(utterances))) for first in range(0, len(utterances), CHUNK)]
    places = [f"wav/{number:04d}" for number in range(len(chunks))]
    left = [i for i, place in enumerate(places) if not (part / place / "said.jsonl").exists()]
    done = sum(len(chunk) for chunk in chunks) - sum(len(chunks[i]) for i in left)
    if left:
        # Each process has espeak-ng, which speaks with one voice at a time, to itself.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(left)), context, initializer=_leave_with_parent) as pool:
            jobs = {pool.submit(_say_chunk, part, places[i], [utterances[u] for u in chunks[i]]): i for i in left}
            try:
                for job in as_completed(jobs):
                    job.result()
                    done += len(chunks[jobs[job]])
                    if progress is not None:
                        progress(done, len(utterances))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [parse_object(line.content) for place in places for line in read_lines(part / place / "said.jsonl")]


def _leave_with_parent() -> None:
    """Ends this process when the one that began it is killed: it would wait for work for ever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _say_chunk(part: Path, place: str, utterances: Sequence[Utterance]) -> None:
    """Says some utterances into PART/PLACE; said.jsonl is there when all are."""
    (part / place).mkdir(parents=True, exist_ok=True)
    lines = [say(part, f"{place}/{i:02d}.wav", utterance) for i, utterance in enumerate(utterances)]
    write_text(part / place / "said.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def say(folder: Path, place: str, utterance: Utterance) -> Said:
    """Writes FOLDER/PLACE and returns its line of a manifest."""
    wave, rate, words = speak(utterance.text, utterance.voice, utterance.words_per_minute, utterance.pitch)
    own = RATES[utterance.use]
    played = round(rate * utterance.speed / 50) * 50  # Hz; the filter is as long as what rates have not in common
    speed = played / rate
    room = utterance.room
    wave = resample(wave, played, own)
    if room is not None:
        wave = room.record(wave, own, zlib.crc32(utterance.text.encode()))
    save_audio(folder / place, wave, own)
    before = 0.0 if room is None else room.before
    # Resampling may cost the last part of a sample's time.
    times = [[word, round(before + a / speed, 3), round(before + b / speed, 3)] for word, a, b in words]
    return {"audio": place, "text": utterance.text, "words": times}


def _write_manifests(part: Path, plan: Plan, said: Sequence[Said], draw: random.Random) -> None:
    valid = plan.valid
    heard = [
        text for text in plan.answers if not domain.kept_answer(text)
    ]  # by the speech tokenizer and the decoder, in training
    questions = [dialogue.asked for dialogue in plan.singles]
    seconds = [dialogue.asked_second for dialogue in plan.doubles]
    spoken = [plan.answers[text] for text in _often(heard)]

    def write(name: str, places: Sequence[int]) -> None:
        write_manifest(part / f"{name}.jsonl", [said[place] for place in draw.sample(places, len(places))])

    write("tokenizer", [*questions[valid:], *seconds[valid:], *plan.rows, *spoken, *plan.extras[valid:]])
    write("tokenizer-valid", [*questions[:valid], *seconds[:valid]])
    write("decoder", [*spoken, *plan.extras[valid:]])
    write("decoder-valid", plan.extras[:valid])
    write("interleaved", plan.documents)
    write("asr", [*questions[valid:], *seconds[valid:], *plan.rows, *plan.answers.values()])
    write("tts", [*(plan.answers[text] for text in _often(plan.answers)), *plan.extras])
    for name, singles, doubles in (
        ("chat", plan.singles[valid:], plan.doubles[valid:]),
        ("chat-valid", plan.singles[:valid], plan.doubles[:valid]),
    ):
        lines = list(_chats(plan, said, singles, doubles, draw))
        write_manifest(part / f"{name}.jsonl", draw.sample(lines, len(lines)))
    texts = {name: list(lines) for name, lines in _texts(draw).items()}
    for name, lines in texts.items():
        write_manifest(part / f"{name}.jsonl", [{"text": text} for text in lines])
    hours = {
        name: round(sum(said[place]["words"][-1][2] for place in places) / 3600, 2)
        for name, places in {
            "questions": [*questions, *seconds],
            "answers": [*plan.answers.values(), *plan.extras],
            "documents": plan.documents,
            "rows": plan.rows,
        }.items()
    }
    about = read_json(part / "about.json")
    write_text(part / "about.json", json.dumps({**about, "hours": hours}, indent=1) + "\n")


def _often(answers: Iterable[str]) -> Iterator[str]:
    """The answers, those without numbers as often as OFTEN says."""
    few = {fact.answer for fact in domain.facts() if fact.kind in ("capital", "colour", *SOCIAL)}
    for answer in answers:
        yield from [answer] * (OFTEN if answer in few else 1)


def _chats(
    plan: Plan, said: Sequence[Said], singles: Sequence[Dialogue], doubles: Sequence[Dialogue], draw: random.Random
) -> Iterator[dict]:
    """Every spoken question with a spoken answer and with a written one, every second fact asked in writing too; two
    turns as they come; conversations of these."""

    def turns(way: str, question: str, asked: int, answer: str) -> list[dict]:
        parts = ("user", way[0], question, asked), ("assistant", way[1], answer, plan.answers[answer])
        return [
            {"role": role, **({"audio": said[place]["audio"]} if form == "s" else {"text": text})}
            for role, form, text, place in parts
        ]

    def first_turns(way: str, dialogue: Dialogue) -> list[dict]:
        # A written question need not be the one that was spoken.
        text = dialogue.question.text if way[0] == "s" else _trained(dialogue.question.fact, draw).text
        return turns(way, text, dialogue.asked, dialogue.question.fact.answer)

    def second_turns(way: str, dialogue: Dialogue) -> list[dict]:
        return turns(way, dialogue.second.text, dialogue.asked_second, dialogue.second.answer)

    def chat(way: str, parts: Iterable[dict]) -> dict:
        return {
            "turns": [{"role": "system", "text": DEFAULT_SYSTEM_PROMPT["speech" if way[1] == "s" else "text"]}, *parts]
        }

    for number, dialogue in enumerate(singles):
        for way in ("ss", "st") if number % 2 else ("ss", "st", WAYS[2 + number // 2 % 2]):
            yield chat(way, first_turns(way, dialogue))
    for number, dialogue in enumerate(doubles):
        first = "ss" if number % 2 else WAYS[number // 2 % 4]
        second = first if number % 4 else first[0] + draw.choice("st")
        yield chat(first, [*first_turns(first, dialogue), *second_turns(second, dialogue)])
    seconds = {said[place]["audio"]: said[place]["words"][-1][2] + PAUSES[1] for place in _spoken(plan)}
    for number in range(round(plan.talks * len(singles) / len(plan.singles))):
        way = "ss" if number % 2 else WAYS[number // 2 % 4]
        talk: list[dict] = []
        for _ in range(draw.randint(*TALK_PARTS)):
            own = way if number % 4 else draw.choice(WAYS)
            dialogue = draw.choice(draw.choice((singles, singles, doubles)))
            part = first_turns(own, dialogue) + (second_turns(own, dialogue) if dialogue.second else [])
            if sum(_rows_of(turn, seconds) for turn in (*talk, *part)) > TALK_ROWS:
                break
            talk += part
        if len(talk) > 2:
            yield chat(way, talk)


def _spoken(plan: Plan) -> Iterator[int]:
    """Places of what is said in chats."""
    yield from plan.answers.values()
    for dialogue in (*plan.singles, *plan.doubles):
        yield dialogue.asked
        if dialogue.asked_second is not None:
            yield dialogue.asked_second


def _rows_of(turn: dict, seconds: dict[str, float]) -> float:
    """About how many rows of the language model a turn has; a word is a token."""
    return TURN_ROWS + (SECOND_ROWS * seconds[turn["audio"]] if "audio" in turn else len(turn["text"].split()) + 1)


def _texts(draw: random.Random) -> dict[str, list[str]]:
    """What the text model reads: statements in a row, and questions with answers; each fact often."""
    lines = []
    for _ in range(3):
        order = draw.sample(domain.facts(), len(domain.facts()))
        while order:
            several = order[:4]
            order = order[4:]
            lines.append(" ".join(fact.answer for fact in several))
    asked = []
    for kind in PHRASINGS:
        trained = [question for question in domain.trained_questions() if question.fact.kind == kind]
        drawn = draw.sample(trained, WRITTEN.get(kind, len(trained)))
        asked += [f"{question.text} {question.fact.answer}" for question in drawn]
    draw.shuffle(asked)
    draw.shuffle(lines)
    held = len(asked) // 30
    train = lines + asked[held:]
    draw.shuffle(train)
    return {"text": train, "text-valid": asked[:held]}


def tokenizer_texts(plan: Plan) -> Iterator[str]:
    """What the text tokenizer learns its words from."""
    for text in (*plan.answers, *DEFAULT_SYSTEM_PROMPT.values(), "user", "assistant", "system"):
        yield from [text] * 3
    for question in domain.trained_questions():
        yield question.text
    for phrasings in FOLLOW_UPS.values():
        yield from (phrasing.format("one") for phrasing in phrasings[:RESERVED])


def text_tokenizer(plan: Plan) -> str:
    """A `tokenizer.json`: bytes, every word of the domain, and the special tokens at the ids of TEXT_IDS."""
    endoftext = TEXT_IDS["endoftext_id"]
    return byte_level(learn_merges(tokenizer_texts(plan), endoftext - 256), endoftext)

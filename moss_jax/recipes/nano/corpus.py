"""The corpus of nano, synthesised with espeak-ng: manifests and recordings for every step of the recipe.

    CORPUS/tokenizer.jsonl, tokenizer-valid.jsonl   for the speech tokenizer: all voices, with text and word times
           decoder.jsonl, decoder-valid.jsonl       for the speech decoder: the answering voice, 24 kHz
           text.jsonl, text-valid.jsonl             facts as statements, and questions with their answers
           interleaved.jsonl                        several facts in a row with word times, in all voices
           asr.jsonl, tts.jsonl                     questions, answers and word lists to transcribe; answers to speak
           chat.jsonl, chat-valid.jsonl             conversations in all four combinations of speech and text
           text_tokenizer.json                      a text tokenizer with the domain's words
           about.json                               seed, scale, counts and hours

The lines of every manifest are in random order, so that its first lines are a fair sample. What `domain` holds out for
tests is in none of them: no reserved voice, no reserved phrasing, no held-out question. Recordings of held-out answers
are in the manifests of the language model, but not in tokenizer.jsonl and decoder.jsonl.
"""

import json
import multiprocessing
import os
import random
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from moss_jax.data.corpus import write_manifest
from moss_jax.documents import parse_object, read_json, read_lines
from moss_jax.errors import MossError
from moss_jax.files import output_lock, write_text
from moss_jax.recipes.nano import domain
from moss_jax.recipes.nano.domain import (
    ANSWER_SPEAKER,
    FOLLOW_UPS,
    PHRASINGS,
    RESERVED_PHRASING,
    SOCIAL,
    DomainQuestion,
    Fact,
    FollowUp,
)
from moss_jax.recipes.nano.recordings import ManifestLine, RecordingConditions, Utterance, synthesize
from moss_jax.text.byte_level import byte_level, learn_merges
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT

CHUNK_LINES_FILE = "said.jsonl"  # manifest lines of a finished chunk, until the corpus is complete
UTTERANCES_PER_CHUNK = 100  # synthesised together; an interrupted chunk is made again
# Spoken questions of each kind, at scale 1.
QUESTION_COUNTS = {
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
# At scale 1: dialogues of two turns, documents of several facts, sentences of the answering voice that are no answers.
TWO_TURN_COUNT = 2400
DOCUMENT_COUNT = 800
EXTRA_SENTENCE_COUNT = 500
# Conversations that change their subject, made of the utterances of other dialogues: their number at scale 1, the
# fewest and most dialogues in one, and the most grid rows of one.
LONG_CONVERSATION_COUNT = 3000
LONG_CONVERSATION_PARTS = (2, 4)
MAX_CONVERSATION_ROWS = 220
# Grid rows of a turn without its content, and of a second of speech.
ROWS_PER_TURN = 6
ROWS_PER_SECOND = 12.5
# Lists of words in random order, for ASR: with questions alone the model learns each phrasing as a whole, not its
# words. Their number at scale 1; the fewest and most words in one.
WORD_LIST_COUNT = 3200
WORD_LIST_LENGTH = (3, 8)
# From this scale on every answer is synthesised; below it a share of them, and those of the questions that are asked.
ALL_ANSWERS_SCALE = 0.1
# How often the few answers without numbers are repeated in the manifests of single sentences.
RARE_ANSWER_REPEATS = 15
# Questions of a kind in text.jsonl; of the other kinds all.
WRITTEN_COUNTS = {"sum": 2500, "difference": 2500, "digits": 2500, "greater": 3000, "less": 3000}
VALID_SHARE = 0.03  # of the questions is for the validation manifests
# Questions are played back slower or faster, which shifts pitch and formants, so that twelve voices become more
# (Ko et al., Interspeech 2015, "Audio augmentation for speech recognition").
SPEEDS = tuple(round(0.9 + 0.02 * number, 2) for number in range(11))
# A share of the questions is recorded at another level (dB), in noise (signal-to-noise ratio in dB) and with pauses
# (seconds at each end), as a microphone would; the others are the unchanged output of espeak-ng.
VARIED_CONDITIONS_SHARE = 1 / 2
LEVEL_RANGE = (-18.0, 6.0)
SIGNAL_TO_NOISE_RANGE = (25.0, 60.0)
PAUSE_RANGE = (0.0, 0.2)
MODALITIES = ("ss", "st", "ts", "tt")  # of question and answer: s spoken, t written
# Fields of the language model's config that belong to this text tokenizer.
TEXT_IDS = {
    "text_vocab_size": 800,
    "endoftext_id": 768,
    "im_start_id": 769,
    "im_end_id": 770,
    "sosp_id": 771,
    "modality_pad_id": 792,
}


@dataclass(frozen=True)
class Dialogue:
    """A question with its answer, or two of them; utterances are indices into `CorpusPlan.utterances`."""

    question: DomainQuestion
    utterance: int
    second: FollowUp | None = None
    second_utterance: int | None = None


@dataclass(frozen=True)
class CorpusPlan:
    """The content of a corpus before synthesis; a function of seed and scale alone.

    Attributes:
        utterances: everything that is synthesised; the other fields have indices into it.
        answers: of each answer's text.
        extras: sentences of the answering voice that are no answers.
        word_lists: words in random order, in the voices of questions.
        one_turn, two_turns: dialogues.
        documents: several facts each.
        long_conversations: the number of conversations that are made of the dialogues.
        valid: how many of the first one_turn, two_turns and extras (each) are for the validation manifests.
    """

    utterances: list[Utterance]
    answers: dict[str, int]
    extras: list[int]
    word_lists: list[int]
    one_turn: list[Dialogue]
    two_turns: list[Dialogue]
    documents: list[int]
    long_conversations: int
    valid: int


def plan_corpus(seed: int = 0, scale: float = 1.0) -> CorpusPlan:
    """The content of the corpus. At scale 1 about nine hours, of which one and a half are the answering voice."""
    draw = random.Random(f"nano corpus {seed}")
    utterances: list[Utterance] = []

    def add(utterance: Utterance) -> int:
        utterances.append(utterance)
        return len(utterances) - 1

    def question(text: str) -> Utterance:
        return Utterance(text, *domain.draw_speaker(draw), "question", draw.choice(SPEEDS), _draw_conditions(draw))

    def ask(text: str) -> int:
        return add(question(text))

    def answer(text: str) -> int:
        return add(Utterance(text, *ANSWER_SPEAKER, "answer"))

    def count(amount: float) -> int:
        return max(2, round(amount * scale))

    answers = {text: answer(text) for text in domain.answers()}
    one_turn = [
        Dialogue(drawn, ask(drawn.text))
        for kind, amount in QUESTION_COUNTS.items()
        for drawn in _draw_questions(kind, count(amount), draw)
    ]
    draw.shuffle(one_turn)
    two_turns = []
    continuable = [dialogue for dialogue in one_turn if dialogue.question.fact.kind not in (*SOCIAL, "greater", "less")]
    for first in draw.choices(continuable, k=count(TWO_TURN_COUNT)):
        second = draw.choice(list(domain.follow_ups(first.question.fact, reserved=False)))
        second_utterance = add(replace(utterances[first.utterance], text=second.text))
        two_turns.append(Dialogue(first.question, first.utterance, second, second_utterance))
    documents = []
    for number in range(count(DOCUMENT_COUNT)):
        facts = draw.sample(domain.facts(), draw.randint(2, 5))
        if number % 2:  # questions with their answers
            parts = [f"{_draw_trained_question(fact, draw).text} {fact.answer}" for fact in facts[:3]]
            documents.append(ask(" ".join(parts)))
        else:
            documents.append(answer(" ".join(fact.answer for fact in facts)))
    extras = [answer(text) for text in _extra_sentences(count(EXTRA_SENTENCE_COUNT), draw)]
    # A word list that happens to be a question is left out after its draw, so that the other draws do not change.
    questions = {known.text for known in domain.questions()}
    word_lists = []
    for utterance in map(question, _draw_word_lists(count(WORD_LIST_COUNT), draw)):
        if utterance.text not in questions:
            word_lists.append(add(utterance))
    plan = CorpusPlan(
        utterances=utterances,
        answers=answers,
        extras=extras,
        word_lists=word_lists,
        one_turn=one_turn,
        two_turns=two_turns,
        documents=documents,
        long_conversations=count(LONG_CONVERSATION_COUNT),
        valid=max(1, round(VALID_SHARE * len(one_turn))),
    )
    if scale >= ALL_ANSWERS_SCALE:
        return plan
    wanted = {dialogue.question.fact.answer for dialogue in (*one_turn, *two_turns)}
    wanted |= {dialogue.second.answer for dialogue in two_turns if dialogue.second is not None}
    return _with_answers(plan, wanted | set(draw.sample(list(answers), count(len(answers) / ALL_ANSWERS_SCALE))))


def _with_answers(plan: CorpusPlan, wanted: Collection[str]) -> CorpusPlan:
    """The plan with these answers only; the utterances are renumbered."""
    answers = {text: index for text, index in plan.answers.items() if text in wanted}
    others = sorted(set(range(len(plan.utterances))) - set(plan.answers.values()))
    kept = [*answers.values(), *others]
    new_index = {old: new for new, old in enumerate(kept)}

    def renumbered(dialogue: Dialogue) -> Dialogue:
        second = None if dialogue.second_utterance is None else new_index[dialogue.second_utterance]
        return replace(dialogue, utterance=new_index[dialogue.utterance], second_utterance=second)

    return replace(
        plan,
        utterances=[plan.utterances[index] for index in kept],
        answers={text: new_index[index] for text, index in answers.items()},
        extras=[new_index[index] for index in plan.extras],
        word_lists=[new_index[index] for index in plan.word_lists],
        one_turn=[renumbered(dialogue) for dialogue in plan.one_turn],
        two_turns=[renumbered(dialogue) for dialogue in plan.two_turns],
        documents=[new_index[index] for index in plan.documents],
    )


def _draw_questions(kind: str, amount: int, draw: random.Random) -> Iterator[DomainQuestion]:
    """Questions of a kind, all facts equally often."""
    facts = [fact for fact in domain.facts() if fact.kind == kind]
    order: list[Fact] = []
    while len(order) < amount:
        order += draw.sample(facts, len(facts))
    for fact in order[:amount]:
        yield _draw_trained_question(fact, draw)


def _draw_trained_question(fact: Fact, draw: random.Random) -> DomainQuestion:
    """A question about a fact that is not held out."""
    return draw.choice(_trained_questions_by_fact()[fact])


@lru_cache(maxsize=1)
def _trained_questions_by_fact() -> dict[Fact, list[DomainQuestion]]:
    by_fact: dict[Fact, list[DomainQuestion]] = {}
    for question in domain.trained_questions():
        by_fact.setdefault(question.fact, []).append(question)
    return by_fact


def _extra_sentences(amount: int, draw: random.Random) -> list[str]:
    """Sentences that are no answers, for the decoder: longer rows of digits, negations, questions."""
    capitals = domain.CAPITALS
    colours = domain.COLOURS
    negations = [
        f"The capital of {country} is not {city}."
        for country in capitals
        for city in capitals.values()
        if city != capitals[country]
    ]
    negations += [
        f"{thing} is not {colour}."
        for thing in colours
        for colour in dict.fromkeys(colours.values())
        if colour != colours[thing]
    ]
    sentences: dict[str, None] = dict.fromkeys(draw.sample(negations, min(len(negations), amount // 4)))
    while len(sentences) < amount:
        digits = f"{' '.join(draw.choices(domain.NUMBERS, k=draw.randint(3, 7)))}."
        question = _draw_trained_question(draw.choice(domain.facts()), draw).text
        sentences[draw.choice((digits, question))] = None
    return [domain.sentence(text) for text in draw.sample(list(sentences), len(sentences))]


def _draw_conditions(draw: random.Random) -> RecordingConditions | None:
    if draw.random() >= VARIED_CONDITIONS_SHARE:
        return None
    ranges = (LEVEL_RANGE, SIGNAL_TO_NOISE_RANGE, PAUSE_RANGE, PAUSE_RANGE)
    return RecordingConditions(*(round(draw.uniform(*limits), 2) for limits in ranges))


def _draw_word_lists(amount: int, draw: random.Random) -> Iterator[str]:
    """Words of the domain in random order, about half of them numbers and names. The first word is one that begins a
    phrasing, or a number."""
    sentences = [
        re.sub(r"{\d}", "", phrasing).split()
        for phrasings in (*PHRASINGS.values(), *FOLLOW_UPS.values())
        for phrasing in phrasings[:RESERVED_PHRASING]
    ] + [answer.split() for answer in SOCIAL.values()]
    first = sorted({words[0].strip(",.?") for words in sentences if words[0][0].isupper()})
    later = sorted({word.strip(",.?") for words in sentences for word in words[1:]} - {""})
    numbers = domain.NUMBERS[: domain.MAX_NUMBER + 1]
    names = [*domain.CAPITALS, *domain.CAPITALS.values()]
    things = [*domain.COLOURS, *domain.COLOURS.values()]
    held_out = {question.text for question in domain.questions() if question.held_out}
    while amount:
        words = [
            draw.choice(draw.choices((later, numbers, names, things), (8, 6, 1, 1))[0])
            for _ in range(draw.randint(*WORD_LIST_LENGTH))
        ]
        words[0] = draw.choice((draw.choice(first), draw.choice(numbers)))
        text = domain.sentence(f"{' '.join(words)}.")
        if text not in held_out:
            amount -= 1
            yield text


def make_nano_corpus(
    folder: str | Path,
    scale: float = 1.0,
    seed: int = 0,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the corpus. Until it is complete it is in FOLDER.part, where the same call resumes.

    Args:
        folder: must not exist.
        scale: factor of the amounts of the released recipe. From ALL_ANSWERS_SCALE on it has all answers.
        processes: that speak side by side; None for one a core.
        progress: called with how many utterances are there, and of how many.

    Raises:
        MossError: espeak-ng is missing, the folder exists, FOLDER.part is of another seed or scale, another process
            makes this corpus, or the folder cannot be written.
    """
    folder = Path(folder)
    if not 0 < scale <= 100:
        raise MossError(f"scale is {scale:g}, expected a number > 0 and <= 100")
    with output_lock(folder):
        if folder.exists():
            raise MossError(f"{folder}: already exists, expected a new folder")
        _write_corpus(folder, scale, seed, processes, progress)


def _write_corpus(
    folder: Path, scale: float, seed: int, processes: int | None, progress: Callable[[int, int], None] | None
) -> None:
    plan = plan_corpus(seed, scale)
    part = folder.with_name(folder.name + ".part")
    _open_part(part, {"seed": seed, "scale": scale, "utterances": len(plan.utterances)})
    lines = _synthesize_all(part, plan.utterances, processes or os.cpu_count() or 1, progress)
    _write_manifests(part, plan, lines, random.Random(f"nano manifests {seed}"))
    write_text(part / "text_tokenizer.json", text_tokenizer(plan))
    for path in part.glob(f"wav/*/{CHUNK_LINES_FILE}"):
        path.unlink()
    os.rename(part, folder)


def _open_part(part: Path, about: dict[str, Any]) -> None:
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MossError(f"{part}: cannot be written ({error.strerror})") from error
    path = part / "about.json"
    if path.exists():
        previous = read_json(path)
        if any(previous.get(key) != value for key, value in about.items()):
            raise MossError(
                f"{part}: already exists, made with another seed or scale; remove it or choose another folder"
            )
    write_text(path, json.dumps(about, indent=1) + "\n")


def _synthesize_all(
    part: Path, utterances: Sequence[Utterance], processes: int, progress: Callable[[int, int], None] | None
) -> list[ManifestLine]:
    """The manifest lines of all utterances; chunks that are finished already are read."""
    chunks = [
        range(first, min(first + UTTERANCES_PER_CHUNK, len(utterances)))
        for first in range(0, len(utterances), UTTERANCES_PER_CHUNK)
    ]
    folders = [part / "wav" / f"{number:04d}" for number in range(len(chunks))]
    missing = [i for i, folder in enumerate(folders) if not (folder / CHUNK_LINES_FILE).exists()]
    done = len(utterances) - sum(len(chunks[i]) for i in missing)
    if missing:
        # espeak-ng has one voice at a time per process.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(missing)), context, initializer=_exit_with_parent) as pool:
            jobs = {}
            for i in missing:
                chunk = [utterances[index] for index in chunks[i]]
                jobs[pool.submit(_synthesize_chunk, part, folders[i], chunk)] = len(chunk)
            try:
                for job in as_completed(jobs):
                    job.result()
                    done += jobs[job]
                    if progress is not None:
                        progress(done, len(utterances))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [parse_object(line.content) for folder in folders for line in read_lines(folder / CHUNK_LINES_FILE)]


def _exit_with_parent() -> None:
    """Ends this process when its parent is killed; otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()


def _synthesize_chunk(part: Path, folder: Path, utterances: Sequence[Utterance]) -> None:
    """Synthesises some utterances into a folder of PART; the file with their manifest lines is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    name = folder.relative_to(part).as_posix()
    lines = [synthesize(part, f"{name}/{i:02d}.wav", utterance) for i, utterance in enumerate(utterances)]
    write_text(folder / CHUNK_LINES_FILE, "".join(json.dumps(line) + "\n" for line in lines))


def _write_manifests(part: Path, plan: CorpusPlan, lines: Sequence[ManifestLine], draw: random.Random) -> None:
    valid = plan.valid
    codec_answers = [text for text in plan.answers if not domain.answer_is_held_out(text)]
    spoken_answers = [plan.answers[text] for text in _with_repeats(codec_answers)]
    questions = [dialogue.utterance for dialogue in plan.one_turn]
    second_questions = [
        dialogue.second_utterance for dialogue in plan.two_turns if dialogue.second_utterance is not None
    ]

    def write(name: str, utterances: Sequence[int]) -> None:
        write_manifest(part / f"{name}.jsonl", [lines[index] for index in draw.sample(utterances, len(utterances))])

    train_questions = [*questions[valid:], *second_questions[valid:]]
    write("tokenizer", [*train_questions, *plan.word_lists, *spoken_answers, *plan.extras[valid:]])
    write("tokenizer-valid", [*questions[:valid], *second_questions[:valid]])
    write("decoder", [*spoken_answers, *plan.extras[valid:]])
    write("decoder-valid", plan.extras[:valid])
    write("interleaved", plan.documents)
    write("asr", [*train_questions, *plan.word_lists, *plan.answers.values()])
    write("tts", [*(plan.answers[text] for text in _with_repeats(plan.answers)), *plan.extras])
    for name, one_turn, two_turns in (
        ("chat", plan.one_turn[valid:], plan.two_turns[valid:]),
        ("chat-valid", plan.one_turn[:valid], plan.two_turns[:valid]),
    ):
        chats = list(_chats(plan, lines, one_turn, two_turns, draw))
        write_manifest(part / f"{name}.jsonl", draw.sample(chats, len(chats)))
    for name, texts in _written_texts(draw).items():
        write_manifest(part / f"{name}.jsonl", [{"text": text} for text in texts])
    groups = {
        "questions": [*questions, *second_questions],
        "answers": [*plan.answers.values(), *plan.extras],
        "documents": plan.documents,
        "rows": plan.word_lists,
    }
    hours = {
        name: round(sum(_seconds(lines[index]) for index in utterances) / 3600, 2)
        for name, utterances in groups.items()
    }
    about = read_json(part / "about.json")
    write_text(part / "about.json", json.dumps({**about, "hours": hours}, indent=1) + "\n")


def _seconds(line: ManifestLine) -> float:
    """When the last word of a recording ends."""
    return line["words"][-1][2]


def _with_repeats(answers: Iterable[str]) -> Iterator[str]:
    """The answers; those without numbers, of which there are few, RARE_ANSWER_REPEATS times."""
    rare = {fact.answer for fact in domain.facts() if fact.kind in ("capital", "colour", *SOCIAL)}
    for answer in answers:
        yield from [answer] * (RARE_ANSWER_REPEATS if answer in rare else 1)


def _chats(
    plan: CorpusPlan,
    lines: Sequence[ManifestLine],
    one_turn: Sequence[Dialogue],
    two_turns: Sequence[Dialogue],
    draw: random.Random,
) -> Iterator[dict[str, Any]]:
    """The conversations: each one-turn dialogue with a spoken question and a spoken and a written answer, every second
    one with a written question too; the two-turn dialogues; and longer conversations made of both."""

    def turns(modalities: str, question: str, utterance: int, answer: str) -> list[dict[str, str]]:
        user = {"audio": lines[utterance]["audio"]} if modalities[0] == "s" else {"text": question}
        assistant = {"audio": lines[plan.answers[answer]]["audio"]} if modalities[1] == "s" else {"text": answer}
        return [{"role": "user", **user}, {"role": "assistant", **assistant}]

    def first_turns(modalities: str, dialogue: Dialogue) -> list[dict[str, str]]:
        question = dialogue.question
        if modalities[0] == "t":  # a written question may have another phrasing than the spoken one
            question = _draw_trained_question(question.fact, draw)
        return turns(modalities, question.text, dialogue.utterance, question.fact.answer)

    def second_turns(modalities: str, dialogue: Dialogue) -> list[dict[str, str]]:
        assert dialogue.second is not None and dialogue.second_utterance is not None
        return turns(modalities, dialogue.second.text, dialogue.second_utterance, dialogue.second.answer)

    def chat(modalities: str, parts: Iterable[dict[str, str]]) -> dict[str, Any]:
        prompt = DEFAULT_SYSTEM_PROMPT["speech" if modalities[1] == "s" else "text"]
        return {"turns": [{"role": "system", "text": prompt}, *parts]}

    for number, dialogue in enumerate(one_turn):
        yield chat("ss", first_turns("ss", dialogue))
        yield chat("st", first_turns("st", dialogue))
        if number % 2 == 0:
            written_question = MODALITIES[2 + number // 2 % 2]
            yield chat(written_question, first_turns(written_question, dialogue))
    for number, dialogue in enumerate(two_turns):
        first = "ss" if number % 2 else MODALITIES[number // 2 % 4]
        second = first if number % 4 else first[0] + draw.choice("st")
        yield chat(first, [*first_turns(first, dialogue), *second_turns(second, dialogue)])
    durations = {lines[index]["audio"]: _seconds(lines[index]) + PAUSE_RANGE[1] for index in _chat_utterances(plan)}
    for number in range(round(plan.long_conversations * len(one_turn) / len(plan.one_turn))):
        modalities = "ss" if number % 2 else MODALITIES[number // 2 % 4]
        conversation: list[dict[str, str]] = []
        for _ in range(draw.randint(*LONG_CONVERSATION_PARTS)):
            part_modalities = modalities if number % 4 else draw.choice(MODALITIES)
            dialogue = draw.choice(draw.choice((one_turn, one_turn, two_turns)))
            part = first_turns(part_modalities, dialogue)
            if dialogue.second is not None:
                part += second_turns(part_modalities, dialogue)
            if sum(_row_count(turn, durations) for turn in (*conversation, *part)) > MAX_CONVERSATION_ROWS:
                break
            conversation += part
        if len(conversation) > 2:
            yield chat(modalities, conversation)


def _chat_utterances(plan: CorpusPlan) -> Iterator[int]:
    """The utterances that conversations are made of."""
    yield from plan.answers.values()
    for dialogue in (*plan.one_turn, *plan.two_turns):
        yield dialogue.utterance
        if dialogue.second_utterance is not None:
            yield dialogue.second_utterance


def _row_count(turn: dict[str, str], durations: dict[str, float]) -> float:
    """About how many grid rows a turn has; a word is one text token.

    Args:
        durations: seconds of each recording.
    """
    if "audio" in turn:
        return ROWS_PER_TURN + ROWS_PER_SECOND * durations[turn["audio"]]
    return ROWS_PER_TURN + len(turn["text"].split()) + 1


def _written_texts(draw: random.Random) -> dict[str, list[str]]:
    """Training and validation texts of the text model: statements in a row, and questions with their answers."""
    lines = []
    for _ in range(3):
        order = draw.sample(domain.facts(), len(domain.facts()))
        while order:
            lines.append(" ".join(fact.answer for fact in order[:4]))
            order = order[4:]
    questions = []
    for kind in PHRASINGS:
        trained = [question for question in domain.trained_questions() if question.fact.kind == kind]
        drawn = draw.sample(trained, WRITTEN_COUNTS.get(kind, len(trained)))
        questions += [f"{question.text} {question.fact.answer}" for question in drawn]
    draw.shuffle(questions)
    draw.shuffle(lines)
    valid = len(questions) // 30
    train = lines + questions[valid:]
    draw.shuffle(train)
    return {"text": train, "text-valid": questions[:valid]}


def tokenizer_texts(plan: CorpusPlan) -> Iterator[str]:
    """The texts that the text tokenizer's merges are learned from."""
    for text in (*plan.answers, *DEFAULT_SYSTEM_PROMPT.values(), "user", "assistant", "system"):
        yield from [text] * 3
    for question in domain.trained_questions():
        yield question.text
    for phrasings in FOLLOW_UPS.values():
        yield from (phrasing.format("one") for phrasing in phrasings[:RESERVED_PHRASING])


def text_tokenizer(plan: CorpusPlan) -> str:
    """The content of a tokenizer.json with bytes, every word of the domain, and the special tokens of TEXT_IDS."""
    endoftext = TEXT_IDS["endoftext_id"]
    return byte_level(learn_merges(tokenizer_texts(plan), endoftext - 256), endoftext)

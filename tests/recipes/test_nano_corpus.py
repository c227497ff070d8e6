"""Nano's domain: nothing that is held out is trained on, and the corpus has the content of its plan."""

import json
from collections import Counter
from concurrent.futures import Future
from itertools import product

import numpy as np
import pytest

from moss_jax.audio import load_audio, resample, save_audio
from moss_jax.cli import main
from moss_jax.convert.random_system import init_random
from moss_jax.data.corpus import write_manifest
from moss_jax.data.espeak import speak
from moss_jax.data.manifest import Manifest
from moss_jax.errors import MossError
from moss_jax.recipes.nano import corpus, domain, recordings
from moss_jax.recipes.nano.domain import PHRASINGS, RESERVED_PHRASING, RESERVED_VOICES, SOCIAL, VOICES
from moss_jax.recipes.nano.items import ITEMS_FOLDER, SETS, make_items, read_items, synthesize_items
from moss_jax.recipes.nano.sizes import LANGUAGE_MODEL
from moss_jax.speech_tokenizer.encode import SpeechTokenizer
from moss_jax.text.tokenizer import SPECIAL_STRINGS, TextTokenizer

NANO_ROWS = LANGUAGE_MODEL.max_position_embeddings - 25  # the system turn has the rest
PLAN = corpus.plan_corpus()


def trained_texts():
    return {utterance.text for utterance in PLAN.utterances}


def reserved_texts():
    first = {question.text for question in domain.questions() if question.reserved}
    second = {f.text for fact in domain.facts() for f in domain.follow_ups(fact, reserved=True)}
    return first | second


def test_the_domain():
    facts = domain.facts()
    counts = {kind: sum(fact.kind == kind for fact in facts) for kind in PHRASINGS}
    assert counts == {
        "sum": 231,
        "difference": 231,
        "capital": 10,
        "colour": 8,
        "greater": 420,
        "less": 420,
        "digits": 1000,
        **dict.fromkeys(SOCIAL, 1),
    }
    answers = {(fact.kind, fact.asked): fact.answer for fact in facts}
    assert answers["sum", ("seven", "five")] == "Seven plus five is twelve."
    assert answers["difference", ("seven", "five")] == "Seven minus five is two."
    assert answers["greater", ("seven", "five")] == "Yes, seven is greater than five."
    assert answers["less", ("seven", "five")] == "No, seven is greater than five."
    assert all(len(set(phrasings)) == len(phrasings) >= 11 for phrasings in (*PHRASINGS.values(),))
    assert len(set(VOICES)) == 12 and len(set(RESERVED_VOICES)) == 3 and not set(VOICES) & set(RESERVED_VOICES)


def test_a_reserved_phrasing_has_no_word_of_its_own():
    def vocabulary(texts):
        return {word.strip(".,?").lower() for text in texts for word in text.split()}

    for phrasings in (*PHRASINGS.values(), *domain.FOLLOW_UPS.values()):
        everything = (*PHRASINGS.values(), *domain.FOLLOW_UPS.values())
        others = [phrasing for of_kind in everything for phrasing in of_kind[:RESERVED_PHRASING]]
        assert vocabulary([phrasings[RESERVED_PHRASING]]) <= vocabulary(others)


def test_phrasings_for_training_alone_join_known_words_anew():
    def vocabulary(texts):
        return {word.strip(".,?").lower() for text in texts for word in text.split()}

    everything = (*PHRASINGS.values(), *domain.FOLLOW_UPS.values())
    known = vocabulary([phrasing for of_kind in everything for phrasing in of_kind[:RESERVED_PHRASING]])
    assert domain.MORE_PHRASINGS.keys() == PHRASINGS.keys()
    for kind, more in domain.MORE_PHRASINGS.items():
        assert len({*more, *PHRASINGS[kind]}) == len(more) + len(PHRASINGS[kind])
        assert vocabulary(more) <= known | vocabulary(SOCIAL.values())
    asked = {question.text for question in domain.trained_questions()}
    assert not asked & reserved_texts() and not asked & {q.text for q in domain.questions() if q.held_out}
    assert {q.text for q in domain.questions() if not q.held_out} < asked


def test_second_turns_refer_to_the_answer_before():
    (seven,) = (f for f in domain.facts() if f.kind == "sum" and f.asked == ("seven", "five"))
    found = {f.text: f.answer for f in domain.follow_ups(seven, reserved=False)}
    assert found["And plus one?"] == "Twelve plus one is thirteen."
    assert found["Now subtract five."] == "Twelve minus five is seven."
    answers = set(domain.answers())
    for fact in domain.facts():
        assert all(f.answer in answers for f in domain.follow_ups(fact, reserved=False))


def test_nothing_that_is_held_out_is_spoken_in_training():
    texts = trained_texts()
    voices = {utterance.voice for utterance in PLAN.utterances}
    assert voices == {*VOICES, domain.ANSWER_SPEAKER[0]}
    assert not texts & reserved_texts()
    held_out = {q.text for q in domain.questions() if q.held_out}
    assert len(held_out) > 3000 and not texts & held_out
    # Documents and the answering voice's other sentences hold questions in their middle.
    long = [u.text for u in PLAN.utterances if u.text.count(" ") > 8]
    few = [text for text in held_out if "capital" in text or "colour" in text]
    assert not any(text in several for several in long for text in few)


def test_nothing_that_is_tested_is_trained():
    texts = trained_texts()
    reserved = reserved_texts()
    made = make_items()
    for group, items in made.items():
        for item in items:
            if group == "sentences":
                assert domain.answer_is_held_out(item.answers[0])
            elif group in ("voices", "both", "two-turn", "new-subject"):
                assert item.voice in RESERVED_VOICES
            else:
                assert item.voice in VOICES
            if (group != "sentences" and item.kind not in SOCIAL) or group == "both":
                assert item.questions[0] not in texts
            if group in ("phrasings", "both"):
                assert item.questions[0] in reserved
    codec = {PLAN.utterances[PLAN.answers[text]].text for text in PLAN.answers if not domain.answer_is_held_out(text)}
    assert not codec & {item.answers[0] for item in made["sentences"]}


def test_the_items_are_frozen():
    made = make_items()
    assert made.keys() == SETS.keys() == {path.stem for path in ITEMS_FOLDER.glob("*.jsonl")}
    for group in SETS:
        assert read_items(group) == made[group]
    minimum_counts = {"voices": 400, "phrasings": 200, "both": 100, "seen": 200, "two-turn": 120, "sentences": 200}
    assert all(len(made[group]) >= count for group, count in minimum_counts.items())
    names = [item.name for items in made.values() for item in items]
    assert len(set(names)) == len(names)
    with pytest.raises(MossError, match="items 'x': unknown"):
        read_items("x")


def test_word_lists_have_every_word_and_no_phrasing():
    word_lists = [PLAN.utterances[place] for place in PLAN.word_lists]
    assert {row.voice for row in word_lists} == set(VOICES) and all(row.use == "question" for row in word_lists)
    spoken = {word.lower() for row in word_lists for word in row.text.strip(".").split()}
    asked = {word.strip(",.?").lower() for q in domain.questions() for word in q.text.split()}
    assert asked <= spoken
    assert not {row.text for row in word_lists} & {q.text for q in domain.questions()}


def test_the_text_tokenizer_has_every_word():
    class Config:
        text_vocab_size = corpus.TEXT_IDS["text_vocab_size"]

    for field in SPECIAL_STRINGS:
        setattr(Config, field, corpus.TEXT_IDS[field])
    text_tokenizer = TextTokenizer(corpus.text_tokenizer(PLAN))
    text_tokenizer.check(Config)
    for text in (*domain.answers(), *(q.text for q in domain.questions()[::50])):
        ids = text_tokenizer.encode(text)
        assert text_tokenizer.decode(ids) == text
        assert len(ids) == len(text.replace(",", " ,").replace(".", " .").replace("?", " ?").split())


def test_an_interrupted_corpus_is_resumed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "UTTERANCES_PER_CHUNK", 12)
    spoken = []
    monkeypatch.setattr(corpus, "ProcessPoolExecutor", InProcessPool)

    def speak_until(text, *speaker):
        spoken.append(text)
        if len(spoken) == 30:
            raise KeyboardInterrupt
        return speak(text, *speaker)

    monkeypatch.setattr(recordings, "speak", speak_until)
    plan = corpus.plan_corpus(scale=0.001)
    assert 10 < len(plan.answers) < 80
    folder = tmp_path / "corpus"
    part = tmp_path / "corpus.part"

    with pytest.raises(KeyboardInterrupt):
        corpus.make_nano_corpus(folder, 0.001)
    assert not folder.exists()
    with pytest.raises(MossError, match="made with another seed or scale"):
        corpus.make_nano_corpus(folder, 0.001, seed=1)
    assert main(["corpus", str(folder), "--nano", "--scale", "0.001"]) == 0
    assert len(spoken) - 30 == len(plan.utterances) - 24 and not part.exists()  # two chunks of twelve were whole
    formats = {
        "tokenizer": "asr",
        "tokenizer-valid": "interleaved",
        "decoder": "speech",
        "decoder-valid": "speech",
        "interleaved": "interleaved",
        "asr": "asr",
        "tts": "tts",
        "chat": "chat",
        "chat-valid": "chat",
        "text": "text",
        "text-valid": "text",
    }
    assert {path.stem for path in folder.glob("*.jsonl")} == formats.keys()
    for name, format in formats.items():
        assert len(Manifest(folder / f"{name}.jsonl", format)) > 0
    for line in (folder / "tokenizer.jsonl").read_text().splitlines():
        entry = json.loads(line)
        wave, rate = load_audio(folder / entry["audio"])
        pause = len(wave) / rate - entry["words"][-1][2]
        assert rate in (16000, 24000) and -2e-3 < pause < corpus.PAUSE_RANGE[1] + 2e-3
    text_counts = Counter(json.loads(line)["text"] for line in (folder / "tts.jsonl").read_text().splitlines())
    few = {*SOCIAL.values(), *(f.answer for f in domain.facts() if f.kind in ("capital", "colour"))}
    assert all(count == (corpus.RARE_ANSWER_REPEATS if text in few else 1) for text, count in text_counts.items())
    assert few & text_counts.keys()
    chats = [json.loads(line)["turns"] for line in (folder / "chat.jsonl").read_text().splitlines()]
    assert {tuple("audio" in turn for turn in turns[1:3]) for turns in chats} == set(product((True, False), repeat=2))
    assert {len(turns) for turns in chats} >= {3, 5}
    assert main(["corpus", str(folder), "--nano"]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_recording_has_its_level_noise_and_pauses():
    rate = 16000
    time = np.arange(16000) / 16000
    tone = (0.1 * np.sin(2 * np.pi * 300 * time)).astype(np.float32)
    conditions = recordings.RecordingConditions(level=-20, signal_to_noise=30, before=0.1, after=0.25)
    wave = conditions.record(tone, rate, seed=1)
    assert wave.dtype == np.float32 and len(wave) == 16000 + 1600 + 4000
    noise = wave - np.pad(0.1 * tone, (1600, 4000))
    for part in (noise[:1600], noise[1600:17600], noise[17600:]):  # as loud in the pauses as below the speech
        assert 20 * np.log10(part.std() / (0.1 * tone).std()) == pytest.approx(-30, abs=2)
    np.testing.assert_array_equal(wave, conditions.record(tone, rate, seed=1))
    assert (
        np.abs(recordings.RecordingConditions(40, 50).record(tone, rate, seed=1)).max() == 1
    )  # clipped, as a recording is
    conditions_of_questions = [PLAN.utterances[dialogue.utterance].conditions for dialogue in PLAN.one_turn]
    assert (
        0.45
        < sum(conditions is not None for conditions in conditions_of_questions) / len(conditions_of_questions)
        < 0.55
    )
    assert all(PLAN.utterances[place].conditions is None for place in (*PLAN.answers.values(), *PLAN.extras))


@pytest.mark.slow
def test_conversations_change_their_subject_and_fit_the_model(tmp_path):
    """Every answer in a conversation is right where it is given."""
    corpus.make_nano_corpus(tmp_path / "corpus", 0.006)
    lines = {
        json.loads(line)["audio"]: json.loads(line)
        for name in ("asr", "tokenizer-valid")
        for line in (tmp_path / "corpus" / f"{name}.jsonl").read_text().splitlines()
    }
    chats = [json.loads(line)["turns"] for line in (tmp_path / "corpus" / "chat.jsonl").read_text().splitlines()]
    long_conversations = [turns[1:] for turns in chats if len(turns) > 3]
    right = {question.text: question.fact for question in domain.trained_questions()}
    changed = longer = 0
    for turns_of_talk in long_conversations:
        texts = [turn.get("text") or lines[turn["audio"]]["text"] for turn in turns_of_talk]
        rows = sum(
            6 + 12.5 * (lines[turn["audio"]]["words"][-1][2] if "audio" in turn else 0.08 * len(text.split()))
            for turn, text in zip(turns_of_talk, texts, strict=True)
        )
        assert [turn["role"] for turn in turns_of_talk] == ["user", "assistant"] * (
            len(turns_of_talk) // 2
        ) and rows < NANO_ROWS
        fact = None
        for asked, answer in zip(texts[::2], texts[1::2], strict=True):
            if asked in right:
                changed += fact is not None
                fact = right[asked]
                assert answer == fact.answer
            else:
                assert (asked, answer) in {(f.text, f.answer) for f in domain.follow_ups(fact, reserved=False)}
        longer += len(turns_of_talk) > 4
    assert changed > 5 and longer > 5


class InProcessPool:
    """A pool of processes that is this process."""

    def __init__(self, processes, context, initializer):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        job = Future()
        job.set_result(function(*args))
        return job

    def shutdown(self, **_):
        pass


def test_items_are_synthesised_once(tmp_path):
    items = read_items("two-turn")[:2]
    (first, second) = synthesize_items("two-turn", tmp_path, items)
    assert len(first["questions"]) == len(first["answers"]) == 2
    assert load_audio(first["questions"][1])[1] == 16000 and load_audio(second["answers"][0])[1] == 24000
    before = first["questions"][0].stat().st_mtime_ns
    assert synthesize_items("two-turn", tmp_path, items) == [first, second]
    assert first["questions"][0].stat().st_mtime_ns == before


def test_manifests_with_codes(tmp_path, capsys):
    """Each recording is encoded once, as it would be alone, and not again."""
    init_random(tmp_path / "tiny", "tiny", say=lambda line: None)
    (tmp_path / "corpus").mkdir()
    for name in ("a", "b"):
        save_audio(tmp_path / "corpus" / f"{name}.wav", *speak(f"What is {name}?")[:2])
    chat = {"turns": [{"role": "user", "audio": "a.wav"}, {"role": "assistant", "text": "A."}]}
    asr = [{"audio": "b.wav", "text": "What is b?"}, {"audio": "a.wav", "text": "What is a?"}]
    write_manifest(tmp_path / "corpus" / "chat.jsonl", [chat])
    write_manifest(tmp_path / "corpus" / "asr.jsonl", asr)
    paths = [str(tmp_path / "corpus" / f"{name}.jsonl") for name in ("chat", "asr")]
    request = ["encode", "--manifests", *paths, "--model", str(tmp_path / "tiny"), "-o", str(tmp_path / "coded")]
    assert main(request) == 0
    assert "encoded 2 of 2 recordings" in capsys.readouterr().err
    (coded,) = [json.loads(line) for line in (tmp_path / "coded" / "chat.jsonl").read_text().splitlines()]
    b, a = [json.loads(line) for line in (tmp_path / "coded" / "asr.jsonl").read_text().splitlines()]
    tokenizer = SpeechTokenizer.load(tmp_path / "tiny" / "speech_tokenizer")
    wave, rate = load_audio(tmp_path / "corpus" / "b.wav")
    assert b == {"text": "What is b?", "codes": tokenizer.encode([resample(wave, rate, 16000)])[0].tolist()}
    assert coded["turns"][0] == {"role": "user", "codes": a["codes"]} and coded["turns"][1] == chat["turns"][1]
    journal = tmp_path / "coded" / "codes.jsonl"
    journal.write_text(journal.read_text()[:-3])  # as if killed in the middle of a line
    assert main(request) == 0
    assert "encoded 2 of 2 recordings" in capsys.readouterr().err
    assert main(request) == 0 and "encoded" not in capsys.readouterr().err
    assert main(["encode", "--model", str(tmp_path / "tiny")]) == 2


def test_bad_requests(tmp_path, capsys):
    for words, texts in (
        (["--nano", "--scale", "0"], "scale is 0"),
        (["--scale", "2"], "--scale goes with --nano"),
        (["--nano", "--utterances", "3"], "--nano goes without"),
    ):
        assert main(["corpus", str(tmp_path / "x"), *words]) == 2
        assert texts in capsys.readouterr().err

"""The corpus of spoken facts: recordings match their texts, and word times match the recordings."""

import json
from itertools import pairwise

import numpy as np
import pytest

from moss_jax.audio import load_audio
from moss_jax.cli import main
from moss_jax.data.corpus import facts
from moss_jax.data.espeak import speak
from moss_jax.errors import MossError
from moss_jax.evaluate.pairs import read_stories
from moss_jax.evaluate.spoken_qa import read_spoken_questions


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_word_times_are_contiguous_and_cover_the_sound():
    wave, rate, words = speak("The capital of France is Paris.", "en-us", 150)
    assert [word for word, _, _ in words] == ["The", "capital", "of", "France", "is", "Paris."]
    assert words[0][1] == 0 and words[-1][2] == len(wave) / rate
    assert all(a < b for _, a, b in words) and all(x[2] == y[1] for x, y in pairwise(words))
    # The pause after the comma belongs to the word before it; the long word takes longer than the short one.
    _, _, (a, b, c) = speak("Yes, extraordinarily so", "en-us", 150)
    assert b[2] - b[1] > c[2] - c[1] and a[2] - a[1] > 0.2
    assert len(speak("one two three", words_per_minute=300)[0]) < 0.7 * len(speak("one two three")[0])


def test_the_corpus_is_complete(tmp_path, capsys):
    folder = tmp_path / "corpus"
    assert main(["corpus", str(folder), "--utterances", "20"]) == 0
    written = {line["text"] for line in lines(folder / "text.jsonl")}
    assert {fact.statement for fact in facts()} <= written and len(facts()) == 99
    held = tuple(fact.question(-1) for fact in facts())
    assert not any(text.startswith(held) for text in written)
    assert all(line["text"].startswith(held) for line in lines(folder / "text-valid.jsonl"))
    for line in lines(folder / "speech.jsonl"):
        wave, rate = load_audio(folder / line["audio"])
        sentences = {f"{sentence}." for sentence in line["text"].removesuffix(".").split(". ")}
        assert sentences <= written and abs(line["words"][-1][2] - len(wave) / rate) < 1e-3
        assert [word for word, _, _ in line["words"]] == line["text"].split()
        assert np.abs(wave).max() > 0.1
    chats = lines(folder / "chat.jsonl")
    kinds = {tuple("audio" in turn for turn in line["turns"][1:]) for line in chats}
    assert len(chats) == 18 and len(kinds) == 4
    assert len(lines(folder / "chat-valid.jsonl")) == 2
    questions = read_spoken_questions(folder / "questions-valid.jsonl")
    pairs = read_stories(folder / "pairs-valid.jsonl")
    assert len(questions) == len(pairs) == 99 + 2 and sum(pair.context.audio is not None for pair in pairs) == 2
    right = {fact.question(-1): fact.answer for fact in facts()}
    for question, pair in zip(questions, pairs, strict=True):
        assert pair.context == question.question and pair.endings[0] != pair.endings[1]
        if pair.context.text:
            assert pair.endings[pair.answer].text == right[pair.context.text] == f"It is {question.answers[0]}."
    assert main(["corpus", str(folder)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_bad_requests(tmp_path, capsys):
    assert main(["corpus", str(tmp_path / "x"), "--utterances", "0"]) == 2
    assert "utterances: 0, expected at least 1" in capsys.readouterr().err


def test_an_unknown_voice():
    with pytest.raises(MossError, match="voice 'nobody'"):
        speak("hello", "nobody")

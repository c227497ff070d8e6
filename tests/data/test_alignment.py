"""Forced alignment: against all paths, and through a CTC checkpoint of transformers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.data.alignment import CTCAligner, align_words, forced_alignment, split_words
from moss_jax.errors import MossError


def collapse(path, blank):
    return [token for token, _ in itertools.groupby(path) if token != blank]


def best_by_trying_all(log_probs, tokens, blank):
    T, V = log_probs.shape
    paths = (path for path in itertools.product(range(V), repeat=T) if collapse(path, blank) == list(tokens))
    return max((sum(log_probs[t, k] for t, k in enumerate(path)), path) for path in paths)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, 1000), st.integers(0, 3))
def test_the_path_is_the_best_of_all(frames, tokens, seed, blank):
    tokens = [(token + blank + 1) % 4 for token in tokens]  # not the blank
    scores = np.random.default_rng(seed).normal(size=(frames, 4)) * 2
    log_probs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
    if frames < needed:
        with pytest.raises(MossError, match=f"has {frames} frames, the text needs {needed}"):
            forced_alignment(log_probs, tokens, blank)
        return
    start, end, score = forced_alignment(log_probs, tokens, blank)
    best, path = best_by_trying_all(log_probs, tokens, blank)
    assert score == pytest.approx(best, abs=1e-9)
    found = np.full(frames, blank)
    for token, a, b in zip(tokens, start, end, strict=True):
        found[a:b] = token
    assert tuple(found) == path


def test_nothing_to_align():
    with pytest.raises(MossError, match="no token to align"):
        forced_alignment(np.zeros((4, 3)), [], 0)


def test_words_of_many_scripts():
    assert split_words("It's 9 o'clock,  said\nhe.") == ["It's", "9", "o'clock,", "said", "he."]
    assert split_words("你好，world吗") == ["你", "好，", "world", "吗"]


def test_words_have_the_times_of_their_letters():
    ids = {"-": 0, "|": 1, "A": 2, "B": 3}
    path = [0, 2, 2, 3, 0, 1, 0, 3, 2, 0]  # " AAB | BA "
    log_probs = np.log(np.full((10, 4), 0.01))
    log_probs[np.arange(10), path] = 0.0
    words = align_words(log_probs, ["ab", "7", "Ba"], ids, 0, "|", 0.02)
    assert [(w.text, round(w.start, 4), round(w.end, 4)) for w in words] == [
        ("ab", 0.02, 0.08),
        ("7", 0.08, 0.08),
        ("Ba", 0.14, 0.18),
    ]


def test_a_checkpoint_gives_every_word_a_time(checkpoint, monkeypatch):
    aligner = CTCAligner(checkpoint)
    wave = np.random.default_rng(0).normal(0, 0.1, 16000 * 3).astype(np.float32)
    words = aligner.words(wave, "Hello there, old 7 friend")
    assert [word.text for word in words] == ["Hello", "there,", "old", "7", "friend"]
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 3
    whole = aligner.log_probs(wave)
    assert whole.shape == (149, 29) and np.allclose(np.exp(whole).sum(1), 1, atol=1e-4)
    # In windows there are as many frames, and those far from the edges are nearly the same.
    monkeypatch.setattr("moss_jax.data.alignment.WINDOW_SECONDS", 1.0)
    monkeypatch.setattr("moss_jax.data.alignment.CONTEXT_SECONDS", 0.5)
    assert aligner.log_probs(wave).shape == whole.shape
    with pytest.raises(MossError, match="has none of the text's characters"):
        aligner.words(wave, "你好")


def test_folders_that_are_no_checkpoints(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(MossError, match="not a CTC checkpoint"):
        CTCAligner(tmp_path)

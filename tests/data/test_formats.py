"""The sequence formats, row by row, and the cuts of interleaved documents."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.convert.text_tokenizer import write_text_tokenizer
from moss_jax.data import formats
from moss_jax.data.formats import Example, ExampleBuilder, cut_interleaved
from moss_jax.data.manifest import Document, Word
from moss_jax.dialogue.grid import prompt_grid
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.speech_lm import TINY
from moss_jax.text.tokenizer import TextTokenizer

EOT = TINY.endoftext_id
SOSP = TINY.sosp_id
PAD = TINY.modality_pad_id
EOSP = TINY.eosp_id
NONE = TINY.audio_pad_id
T = (1, 0)
A = (0, 1)
O = (0, 0)


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text_tokenizer") / "tokenizer.json"
    write_text_tokenizer(path, TINY)
    return TextTokenizer.from_file(path)


def same(example, rows, weights):
    grid, found = example
    assert grid.tolist() == [list(row) for row in rows] and grid.dtype == np.int32
    assert found.tolist() == [list(weight) for weight in weights] and found.dtype == np.float32
    Example(grid, found).check()


def test_text():
    same(formats.text([5, 6], TINY), [(5, NONE), (6, NONE), (EOT, NONE)], [O, T, T])


def test_speech():
    rows = [(SOSP, NONE), (PAD, 7), (PAD, NONE), (PAD, EOSP), (EOT, NONE)]  # 12 is audio_pad and a code
    same(formats.speech(np.array([7, NONE]), TINY), rows, [O, A, A, A, T])


def test_continuation():
    rows = [(SOSP, NONE), (PAD, 1), (PAD, 2), (PAD, 3), (PAD, EOSP), (EOT, NONE)]
    same(formats.continuation(np.array([1, 2, 3]), 2, TINY), rows, [O, O, O, A, A, T])


def test_interleaved():
    rows = [(9, NONE), (SOSP, NONE), (PAD, 4), (PAD, EOSP), (8, NONE), (EOT, NONE)]
    same(formats.interleaved([[9], np.array([4]), [8]], TINY, False), rows, [O, T, A, A, T, T])
    rows = [(SOSP, NONE), (PAD, 4), (PAD, EOSP), (8, NONE), (EOT, NONE)]
    same(formats.interleaved([np.array([4]), [8]], TINY, True), rows, [O, A, A, T, T])


def maker(text_tokenizer, format, **more):
    return ExampleBuilder(format, TINY, text_tokenizer, **more)


def rows_of(text_tokenizer, piece):
    return [(i, NONE) for i in text_tokenizer.encode_template(piece)]


def test_asr_and_tts(text_tokenizer):
    document = Document(1, "a", text="Hi")
    codes = [np.array([3, 4], np.int32)]
    user, reply, end = (
        rows_of(text_tokenizer, piece) for piece in ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n")
    )
    spoken = [(SOSP, NONE), (PAD, 3), (PAD, 4), (PAD, EOSP)]
    written = [(i, NONE) for i in text_tokenizer.encode("Hi")]
    prompt = len(user + spoken + end + reply)
    example = maker(text_tokenizer, "asr").example(document, codes)
    same(
        (example.grid, example.loss_weights),
        user + spoken + end + reply + written + end,
        [O] * prompt + [T] * len(written) + [T] + [O] * (len(end) - 1),
    )
    example = maker(text_tokenizer, "tts").example(document, codes)
    prompt = len(user + written + end + reply)
    same(
        (example.grid, example.loss_weights),
        user + written + end + reply + spoken + end,
        [O] * prompt + [O, A, A, A, T] + [O] * (len(end) - 1),
    )


def test_a_chat_begins_as_generation_does_and_every_reply_is_scored(text_tokenizer):
    document = Document(
        1,
        "a",
        turns=(Turn("user", text="A"), Turn("assistant", text=""), Turn("user", text="B"), Turn("assistant", text="C")),
    )
    codes = [None, np.array([3], np.int32), None, None]
    example = maker(text_tokenizer, "chat").example(document, codes)
    turns = [Turn("user", text="A"), Turn("assistant", codes=[3]), Turn("user", text="B")]
    prompt = prompt_grid(turns, "text", text_tokenizer, TINY)
    assert (example.grid[: len(prompt)] == prompt).all()
    scored = np.flatnonzero(example.loss_weights.any(1))
    assert [tuple(example.grid[i]) for i in scored] == [
        (PAD, 3),
        (PAD, EOSP),
        (TINY.im_end_id, NONE),
        (*text_tokenizer.encode("C"), NONE),
        (TINY.im_end_id, NONE),
    ]
    first = prompt_grid(turns[:1], "speech", text_tokenizer, TINY)
    fallback = len(prompt_grid(turns, "text", text_tokenizer, TINY)) - len(prompt)
    assert fallback == 0 and first[-1].tolist() == [SOSP, NONE]
    message = maker(text_tokenizer, "chat", system="X").example(document, codes)
    expected = prompt_grid([Turn("system", text="X"), *turns], "text", text_tokenizer, TINY)
    assert (message.grid[: len(expected)] == expected).all()


@st.composite
def transcripts(draw):
    """(text, words, codes) with pauses, punctuation and words of many lengths."""
    words = []
    time = 0.0
    text = draw(st.sampled_from(["", "“"]))
    for number in range(draw(st.integers(1, 60))):
        start = time + draw(st.floats(0, 2))
        time = start + draw(st.floats(0, 3))
        words.append(Word(f"w{number % 7}", start, time))
        text += words[-1].text + draw(st.sampled_from([" ", ", ", ". ", "", "\n"]))
    return text, words, max(1, round((time + draw(st.floats(0, 3))) * 12.5)) + 1


@settings(deadline=None)
@given(transcripts(), st.integers(0, 100))
def test_cuts_lie_on_words_and_lose_nothing(transcript, seed):
    text, words, count = transcript
    pieces = cut_interleaved(text, words, count, 12.5, np.random.default_rng(seed))
    assert "".join(piece for piece, _, _ in pieces) == text
    assert [begin for _, begin, _ in pieces[1:]] == [end for _, _, end in pieces[:-1]]
    assert pieces[0][1] == 0 and pieces[-1][2] == count
    middles = {0, count} | {round((a.end + b.start) / 2 * 12.5) for a, b in pairwise(words)}
    placed = 0
    for piece, begin, end in pieces:
        seconds = (end - begin) / 12.5
        assert end > begin and piece.strip()
        assert begin in middles and end in middles
        inside = [word for word in words if begin / 12.5 - 0.05 <= (word.start + word.end) / 2 <= end / 12.5 + 0.05]
        placed += piece.count("w")
        if end < count:
            assert seconds >= 2.9
            # Longer than 6 s only where there is no boundary between 3 and 6 s.
            near = [m for m in middles if 3.1 <= (m - begin) / 12.5 <= 5.9]
            assert seconds <= 6.1 or not near
        assert len(inside) >= piece.count("w") - 2
    assert placed == len(words)


def test_punctuation_stays_before_the_cut_and_white_space_goes_behind():
    words = [Word("Hello", 0.2, 3.0), Word("big", 3.4, 6.4), Word("world", 6.6, 9.0)]
    pieces = cut_interleaved("“Hello, big -- world!”", words, 114, 12.5, np.random.default_rng(0))
    assert [piece for piece, _, _ in pieces] == ["“Hello,", " big", " -- world!”"]
    assert [span for _, *span in pieces] == [[0, 40], [40, 81], [81, 114]]


def test_variants_differ_and_repeat(text_tokenizer):
    words = tuple(Word("ab", i, i + 0.9) for i in range(60))
    document = Document(1, "a", text=" ".join(word.text for word in words), words=words)
    codes = [np.arange(750, dtype=np.int32) % TINY.eosp_id]
    made = maker(text_tokenizer, "interleaved", seed=1)
    grids = [made.example(document, codes, variant).grid.tolist() for variant in range(4)]
    assert len({json.dumps(grid) for grid in grids}) == 4
    assert made.example(document, codes, 2).grid.tolist() == grids[2]
    assert {grid[0][0] == SOSP for grid in grids} == {True, False}  # either may come first
    assert maker(text_tokenizer, "interleaved", seed=2).example(document, codes, 2).grid.tolist() != grids[2]
    other = Document(2, "b", text=document.text, words=words)
    assert made.example(other, codes, 2).grid.tolist() != grids[2]


def test_documents_that_do_not_fit(text_tokenizer):
    one = [np.array([1], np.int32)]
    with pytest.raises(MossError, match="has 1 codes, expected at least 2"):
        maker(text_tokenizer, "continuation").example(Document(1, "a"), one)
    late = Document(1, "a", text="x", words=(Word("x", 5.0, 5.1),))
    with pytest.raises(MossError, match=r"starts at 5 s, the recording ends at 0\.08 s"):
        maker(text_tokenizer, "interleaved").example(late, one)


def test_examples_are_checked():
    grid, weights = formats.text([1, 2], TINY)
    with pytest.raises(MossError, match="its first row has a loss weight"):
        Example(grid, np.ones_like(weights)).check()
    with pytest.raises(MossError, match=r"expected int32 and float32 \[T, 2\]"):
        Example(grid.astype(np.int64), weights).check()

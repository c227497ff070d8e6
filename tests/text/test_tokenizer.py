import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.errors import MossError
from moss_jax.speech_lm import TINY
from moss_jax.text.tokenizer import SPECIAL_STRINGS, TextStream, TextTokenizer

PIECES = st.one_of(st.text(max_size=8), st.sampled_from(sorted(SPECIAL_STRINGS.values())))


@settings(max_examples=50, deadline=None)
@given(pieces=st.lists(PIECES, max_size=5), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_plain_text_survives_whole_and_in_pieces(text_tokenizer, pieces, cuts):
    text = "".join(pieces)
    ids = text_tokenizer.encode(text)
    assert all(i < 256 for i in ids)
    assert text_tokenizer.decode(ids) == text
    edges = sorted(min(cut, len(ids)) for cut in [0, *cuts, len(ids)])
    stream = TextStream(text_tokenizer)
    streamed = [stream.push(ids[a:b]) for a, b in itertools.pairwise(edges)] + [stream.finish()]
    assert "".join(streamed) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in streamed)


def test_the_template_honours_specials(text_tokenizer):
    assert text_tokenizer.encode_template("<|im_start|>")[0] == TINY.im_start_id
    assert text_tokenizer.decode([TINY.im_start_id, 65, TINY.im_end_id]) == text_tokenizer.decode([65])


def test_what_does_not_fit_is_refused(text_tokenizer, tmp_path):
    text_tokenizer.check(TINY)
    with pytest.raises(MossError, match="im_end_id = 7"):
        text_tokenizer.check(replace(TINY, im_end_id=7))
    with pytest.raises(MossError, match=r"ids reach 311, but text_vocab_size is 310"):
        ids = {"modality_pad_id": 311}
        text_tokenizer.check(
            type("Config", (), {**{f: getattr(TINY, f) for f in SPECIAL_STRINGS}, **ids, "text_vocab_size": 310})
        )
    with pytest.raises(MossError, match=r"none\.json: no such file"):
        TextTokenizer.from_file(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(MossError, match=r"bad\.json: not a tokenizer\.json"):
        TextTokenizer.from_file(tmp_path / "bad.json")

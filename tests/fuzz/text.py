"""User text: no string in it becomes a special token, and every string is encoded or refused."""

from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from moss_jax.dialogue.grid import prompt_grid, turn_rows
from moss_jax.dialogue.turns import ROLES, Turn, check_turns
from moss_jax.speech_lm import TINY
from moss_jax.text.byte_level import SPECIAL_TOKENS, byte_level, learn_merges
from moss_jax.text.tokenizer import TextStream, TextTokenizer

PIECES = st.one_of(
    st.text(st.characters(codec=None, exclude_categories=()), max_size=12),
    st.sampled_from(SPECIAL_TOKENS),
    st.sampled_from(
        ["<|", "|>", "im_end", "<|im_", "end|>", "<th", "ink>", "\n", "assistant\n", "\x00", "\ufeff", "\u0301"]
    ),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)
CASES = st.fixed_dictionaries(
    {
        "turns": st.lists(st.tuples(st.sampled_from(ROLES), TEXTS), min_size=1, max_size=3),
        "reply": st.sampled_from(["speech", "text"]),
    }
)


def run(case: dict, folder: Path) -> None:
    turns = [Turn(role, text=text) for role, text in case["turns"]]
    check_turns(turns)
    grid = prompt_grid(turns, case["reply"], tokenizer(), TINY)
    assert grid.shape[1] == 2
    for turn in turns:
        content = tokenizer().encode(turn.text)
        assert all(0 <= i < TINY.endoftext_id for i in content), f"special ids in {content}"
        rows = turn_rows(turn, tokenizer(), TINY)
        special = rows[rows[:, 0] >= TINY.endoftext_id, 0]
        assert special.tolist() == [TINY.im_start_id, TINY.im_end_id], f"special ids in {special}"
        stream = TextStream(tokenizer())
        streamed = "".join(stream.push([i]) for i in content) + stream.finish()
        assert streamed == tokenizer().decode(content)
    assert np.count_nonzero(grid[:, 0] == TINY.im_end_id) <= len(turns) + 1


@cache
def tokenizer() -> TextTokenizer:
    """A tokenizer with merges learned from the special strings, so that parts of them are tokens."""
    merges = learn_merges([*SPECIAL_TOKENS, "the assistant and the user think about the end"], 200)
    return TextTokenizer(byte_level(merges, TINY.endoftext_id))

import numpy as np
import pytest

from dev.reference import dialogue as reference
from moss_jax.dialogue import grid
from moss_jax.dialogue.turns import Turn, check_turns
from moss_jax.errors import MossError
from moss_jax.generate.slots import positions_of
from moss_jax.speech_lm import TINY
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT
from tests.tiny_speech_lm import tokenizer_json

TEXT_OF = {
    TINY.im_start_id: "<|im_start|>",
    TINY.im_end_id: "<|im_end|>",
    TINY.sosp_id: "<sosp>",
    TINY.modality_pad_id: "*",
}


def spell(rows, text_tokenizer):
    """The text channel of rows as one string, specials included."""
    return "".join(TEXT_OF.get(i) or text_tokenizer.decode([i]) for i in rows[:, 0].tolist())


def test_prompt_of_text_and_speech(text_tokenizer):
    turns = [Turn("system", text="Be kind."), Turn("user", codes=[7, 12, 79])]
    rows = grid.prompt_grid(turns, "speech", text_tokenizer, TINY)
    assert spell(rows, text_tokenizer) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n<sosp>****<|im_end|>\n<|im_start|>assistant\n<sosp>"
    )
    spoken = rows[:, 0] == TINY.modality_pad_id
    assert rows[spoken, 1].tolist() == [7, 12, 79, TINY.eosp_id]
    assert set(rows[~spoken, 1]) == {TINY.audio_pad_id}
    assert rows[-1].tolist() == [TINY.sosp_id, TINY.audio_pad_id]
    text_reply = grid.prompt_grid(turns, "text", text_tokenizer, TINY)
    np.testing.assert_array_equal(text_reply, rows[:-1])


def test_the_default_system_turn_is_first_and_that_of_the_released_processor_last(text_tokenizer):
    turns = [Turn("user", text="Hi")]
    ours = spell(grid.prompt_grid(turns, "text", text_tokenizer, TINY), text_tokenizer)
    released = reference.with_processor_system(turns, "text")
    theirs = spell(np.concatenate(grid.prompt_pieces(released, "text", text_tokenizer, TINY)), text_tokenizer)
    default, processor = (
        f"<|im_start|>system\n{texts['text']}<|im_end|>\n"
        for texts in (DEFAULT_SYSTEM_PROMPT, reference.PROCESSOR_SYSTEM_PROMPT)
    )
    user = "<|im_start|>user\nHi<|im_end|>\n"
    opening = "<|im_start|>assistant\n"
    assert ours == default + user + opening
    assert theirs == user + processor + opening


def test_special_strings_in_a_turn_are_plain_text(text_tokenizer):
    text = "say <|im_end|>, <think> and <|object_ref_start|>."
    ours = grid.turn_rows(Turn("user", text=text), text_tokenizer, TINY)
    assert [i for i in ours[:, 0] if i >= 256] == [TINY.im_start_id, TINY.im_end_id]  # those of the template
    assert text_tokenizer.decode(ours[:, 0]) == f"user\n{text}\n"
    processor_tokenizer = reference.ProcessorTokenizer(tokenizer_json(TINY))
    theirs = grid.turn_rows(Turn("user", text=text), processor_tokenizer, TINY)
    assert [i for i in theirs[:, 0] if i >= 256] == [
        TINY.im_start_id,
        TINY.im_end_id,
        TINY.modality_pad_id,
        TINY.sosp_id,
        TINY.im_end_id,
    ]


def test_whitespace_is_kept_and_empty_content_has_no_rows(text_tokenizer):
    rows = grid.turn_rows(Turn("user", text="  a\n "), text_tokenizer, TINY)
    assert spell(rows, text_tokenizer) == "<|im_start|>user\n  a\n <|im_end|>\n"
    assert spell(grid.turn_rows(Turn("user", text=""), text_tokenizer, TINY), text_tokenizer) == (
        "<|im_start|>user\n<|im_end|>\n"
    )


def test_padding_on_the_left():
    grids = [np.arange(6).reshape(3, 2), np.arange(2).reshape(1, 2)]
    batch, valid = grid.pad_left(grids, TINY)
    assert valid.tolist() == [[True] * 3, [False, False, True]]
    assert batch[1].tolist() == [[TINY.endoftext_id, TINY.audio_pad_id]] * 2 + [[0, 1]]
    assert positions_of(valid).tolist() == [[0, 1, 2], [1, 1, 0]]


@pytest.mark.parametrize(
    ("rows", "ids", "codes", "complete"),
    [
        ([(311, 5), (311, 6), (311, 80), (289, 3)], [289], [5, 6], True),
        ([(311, 5), (311, 6)], [], [5, 6], False),
        ([(65, 12), (66, 12), (289, 12)], [65, 66, 289], [], False),
        ([(311, 80), (65, 12), (290, 12), (311, 4), (311, 80)], [65, 290], [], True),
    ],
)
def test_reading_a_reply(rows, ids, codes, complete):
    reply = grid.read_reply(np.array(rows), TINY)
    assert reply.text_ids == ids
    assert reply.codes.tolist() == codes
    assert reply.complete == complete


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Turn("robot", text="x"), "role is 'robot'"),
        (lambda: Turn("user"), "it has nothing"),
        (lambda: Turn("user", text="x", codes=[1]), "text and codes"),
        (lambda: Turn("user", audio=np.zeros(4)), "without a sample_rate"),
        (lambda: Turn("user", audio=3), "audio is int"),
        (lambda: Turn("user", text=b"x"), "text is bytes"),
        (lambda: Turn("user", codes=[0.5]), "expected a list of integers"),
        (lambda: check_turns([]), "empty"),
        (lambda: check_turns([Turn("user", text=" \n")]), "empty text"),
        (lambda: check_turns([Turn("user", codes=[])]), "no codes"),
        (lambda: check_turns([Turn("assistant", text="x")]), "the last turn is of assistant"),
        (lambda: check_turns(["x"]), "entry 0 is str"),
        (lambda: grid.speech_rows([3, 80], TINY), "80 is not a speech code, expected 0 to 79"),
        (lambda: grid.speech_rows([-1], TINY), "-1 is not a speech code"),
        (lambda: grid.reply_header("song", None, TINY), "expected one of speech, text"),
        (lambda: grid.turn_rows(Turn("user", audio="x.wav"), None, TINY), "must be encoded"),
    ],
)
def test_bad_input_is_reported_in_one_line(make, message):
    with pytest.raises(MossError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)

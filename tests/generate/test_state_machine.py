import numpy as np
import pytest

from moss_jax.generate.state_machine import AUDIO, TEXT, embeds_audio, initial_mode, next_mode, stop_reason
from moss_jax.speech_lm import TINY

WORD = 5
CODE = 3
SOSP = TINY.sosp_id
PAD = TINY.modality_pad_id
END = TINY.im_end_id
EOSP = TINY.eosp_id
AUDIO_PAD = TINY.audio_pad_id


@pytest.mark.parametrize(
    ("mode", "row", "default", "compat"),
    [
        (TEXT, (WORD, AUDIO_PAD), TEXT, TEXT),
        (TEXT, (WORD, EOSP), TEXT, TEXT),
        (TEXT, (SOSP, AUDIO_PAD), AUDIO, AUDIO),
        (TEXT, (SOSP, EOSP), AUDIO, TEXT),  # the reference takes a meaningless draw for the end of speech
        (AUDIO, (PAD, CODE), AUDIO, AUDIO),
        (AUDIO, (PAD, AUDIO_PAD), AUDIO, AUDIO),
        (AUDIO, (PAD, EOSP), TEXT, TEXT),
    ],
)
def test_next_mode(mode, row, default, compat):
    row = np.array(row)
    assert next_mode(np.array(mode), row[0], row[1], TINY) == default
    assert next_mode(np.array(mode), row[0], row[1], TINY, compat=True) == compat


@pytest.mark.parametrize(
    ("row", "default", "compat"),
    [
        ((WORD, AUDIO_PAD), TEXT, TEXT),
        ((SOSP, AUDIO_PAD), TEXT, TEXT),
        ((PAD, CODE), AUDIO, AUDIO),
        ((PAD, AUDIO_PAD), AUDIO, TEXT),  # a real code with the placeholder's number
    ],
)
def test_initial_mode(row, default, compat):
    text, audio = np.array(row)
    assert initial_mode(text, audio, TINY) == default
    assert initial_mode(text, audio, TINY, compat=True) == compat


def test_stop_and_embedding_source():
    text = np.array([WORD, END, TINY.endoftext_id, PAD])
    assert stop_reason(text, TINY).tolist() == [0, 1, 2, 0]
    assert embeds_audio(text, TINY).tolist() == [False, False, False, True]

import numpy as np
import pytest

from dev.reference import dialogue as reference
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
    ("mode", "row", "expected", "released"),
    [
        (TEXT, (WORD, AUDIO_PAD), TEXT, TEXT),
        (TEXT, (WORD, EOSP), TEXT, TEXT),
        (TEXT, (SOSP, AUDIO_PAD), AUDIO, AUDIO),
        (TEXT, (SOSP, EOSP), AUDIO, TEXT),  # the released program takes an unused sample for the end of speech
        (AUDIO, (PAD, CODE), AUDIO, AUDIO),
        (AUDIO, (PAD, AUDIO_PAD), AUDIO, AUDIO),
        (AUDIO, (PAD, EOSP), TEXT, TEXT),
    ],
)
def test_next_mode(mode, row, expected, released):
    row = np.array(row)
    assert next_mode(np.array(mode), row[0], row[1], TINY) == expected
    assert reference.next_mode(np.array(mode), row[0], row[1], TINY) == released


@pytest.mark.parametrize(
    ("row", "expected", "released"),
    [
        ((WORD, AUDIO_PAD), TEXT, TEXT),
        ((SOSP, AUDIO_PAD), TEXT, TEXT),
        ((PAD, CODE), AUDIO, AUDIO),
        ((PAD, AUDIO_PAD), AUDIO, TEXT),  # a real code with the number of audio_pad
    ],
)
def test_initial_mode(row, expected, released):
    text, audio = np.array(row)
    assert initial_mode(text, audio, TINY) == expected
    assert reference.initial_mode(text, audio, TINY) == released


def test_stop_and_embedding_source():
    text = np.array([WORD, END, TINY.endoftext_id, PAD])
    assert stop_reason(text, TINY).tolist() == [0, 1, 2, 0]
    assert embeds_audio(text, TINY).tolist() == [False, False, False, True]

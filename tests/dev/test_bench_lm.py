"""The benchmark of the language model runs; its timings are not tested."""

import pytest

from dev.bench import Options
from dev.bench.lm import run, step_bytes
from moss_jax.errors import MossError
from moss_jax.speech_lm import MOSS_SPEECH_8B


def test_a_spoken_step_reads_the_weights_of_shared_layers_audio_layers_and_audio_head():
    assert round(step_bytes(MOSS_SPEECH_8B) / 1e9, 2) == 14.03


def test_an_unknown_size_is_an_error():
    with pytest.raises(MossError, match="unknown size 'huge'"):
        next(run(Options("huge")))


@pytest.mark.slow
def test_rows_of_a_tiny_model():
    rows = list(run(Options("tiny", repeats=1, peer=False)))
    assert [row.name for row in rows] == ["prefill, 1 x 128 rows", "decode, 5 steps, batch 1"]
    assert all(len(row.ours) == 1 and not row.peer for row in rows) and "steps/s" in rows[1].note

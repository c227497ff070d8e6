"""The system that is part of the package: it is there, small, and answers."""

import json

import numpy as np
import pytest
import soundfile

import moss_jax
from moss_jax.checkpoint.system_folder import NANO_FOLDER
from moss_jax.cli import main
from moss_jax.errors import MossError

ANSWER = "Seven plus four is eleven."


@pytest.fixture(scope="module")
def nano():
    return moss_jax.load()


def test_size_and_sampling(nano):
    assert sum(path.stat().st_size for path in NANO_FOLDER.rglob("*.safetensors")) < 20e6
    assert nano.sampling["greedy"] and nano.sampling["repetition_penalty"] == 1.0
    assert not nano.can_enrol and nano.folder.voices() == []


@pytest.mark.slow
def test_every_combination_of_speech_and_text(nano):
    question = NANO_FOLDER / "question.wav"
    turns = [moss_jax.Turn("user", audio=question)]
    assert nano.reply(turns, reply="text").text.strip() == ANSWER
    spoken = nano.reply(turns)
    assert spoken.complete and 1 < spoken.wave.size / spoken.sample_rate < 4
    stream = nano.stream(turns)
    waves = [piece.wave for piece in stream if piece.wave.size]
    np.testing.assert_array_equal(stream.reply.codes, spoken.codes)
    assert len(waves) > 2 and sum(map(len, waves)) == spoken.wave.size
    more = nano.reply([moss_jax.Turn("user", text="And plus one?")], reply="text", conversation=spoken.conversation)
    assert more.text.strip() == "Eleven plus one is twelve."


@pytest.mark.slow
def test_chat_without_a_model(tmp_path, capsys):
    out = tmp_path / "answer.wav"
    assert main(["chat", str(NANO_FOLDER / "question.wav"), "-o", str(out)]) == 0
    wave, rate = soundfile.read(out)
    assert rate == 24000 and np.sqrt(np.square(wave).mean()) > 0.01
    capsys.readouterr()
    assert main(["chat", "--text", "What is the capital of Peru?", "--reply", "text"]) == 0
    assert capsys.readouterr().out.strip() == "The capital of Peru is Lima."
    assert main(["chat", "--text", "Hello.", "--reply", "text", "--codec", str(tmp_path)]) == 2
    assert "--codec: is used together with --model, which is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"warmth": 1}, "'warmth': no such setting, expected some of temperature"),
        ([0.5], "expected an object"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"top_p": 2.0}, "top_p is 2.0, expected a number from 1e-06 to 1"),
    ],
)
def test_a_folder_with_invalid_sampling_settings(tmp_path, sampling, says):
    from moss_jax.dialogue.system import System

    (tmp_path / "system.json").write_text(json.dumps({"format": "moss-jax-1", "sampling": sampling}))
    with pytest.raises(MossError, match=says):
        _ = System(tmp_path).sampling

"""Recordings in questions: no speech, channels that cancel, arrays, standard input."""

import io
import sys
import types

import numpy as np
import pytest
import soundfile

import moss_jax
from moss_jax.cli import main
from moss_jax.convert.random_system import init_random
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError

RATE = 16000
NOISE = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
SHORT = {"max_new_tokens": 3, "min_new_tokens": 3}
NO_SPEECH = {
    "silence": np.zeros(RATE, np.float32),
    "near-silence": NOISE * 1e-4,
    "one-sample": np.full(1, 0.1, np.float32),
    "constant": np.full(RATE, 0.3, np.float32),
    "both-channels-silent": np.zeros((RATE, 2), np.float32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("systems") / "tiny"
    init_random(path, say=lambda line: None)
    return path


@pytest.fixture(scope="module")
def system(folder):
    return moss_jax.load(folder, context=512)


def question(wave, rate=RATE):
    return [Turn("user", audio=wave, sample_rate=rate)]


def verb(folder, tmp_path, *arguments):
    return main([*map(str, arguments), "--model", str(folder)])


@pytest.mark.parametrize("name", NO_SPEECH)
def test_recordings_without_speech_are_refused_everywhere(name, folder, system, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wave = NO_SPEECH[name]
    soundfile.write("q.wav", wave, RATE, subtype="FLOAT")
    message = "no speech found|too short to hold speech"
    for audio in (Turn("user", audio="q.wav"), question(wave)[0]):
        with pytest.raises(MossError, match=message):
            system.reply([audio], reply="text", **SHORT)
        with pytest.raises(MossError, match=message):
            system.stream([audio], reply="text", **SHORT)
        with pytest.raises(MossError, match=message):
            list(system.reply_batch([[audio]], reply="text", **SHORT))
    for recording in ("q.wav", (wave, RATE)):
        with pytest.raises(MossError, match=message):
            system.enrol(recording)
    for arguments in (["chat", "q.wav", "--reply", "text"], ["voice", "q.wav", "-o", "v.safetensors"]):
        assert verb(folder, tmp_path, *arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"moss-jax {arguments[0]}: q.wav: ")
        assert "no speech found" in err or "too short to hold speech" in err
    assert [path.name for path in tmp_path.iterdir()] == ["q.wav"]


def test_quiet_speech_is_answered_and_silence_can_be_encoded(system):
    system.reply(question(NOISE * np.float32(10 ** (-35 / 20))), reply="text", **SHORT)
    assert len(system.encode([(NO_SPEECH["silence"], RATE)])[0]) == 13


def test_channels_that_cancel_are_reported(folder, system, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    soundfile.write("q.wav", np.stack([NOISE, -NOISE], 1), RATE, subtype="FLOAT")
    reply = system.reply([Turn("user", audio="q.wav")], reply="text", **SHORT)
    assert reply.notices[0].startswith("q.wav: its 2 channels cancel each other; channel 1 is used")
    mono = system.reply(question(NOISE), reply="text", **SHORT)
    assert mono.text == reply.text and mono.notices == reply.notices[1:]
    stream = system.stream([Turn("user", audio="q.wav")], reply="text", **SHORT)
    list(stream)
    assert stream.reply.notices == reply.notices
    first, second = system.reply_batch([question(NOISE), [Turn("user", audio="q.wav")]], reply="text", **SHORT)
    assert not any("cancel" in notice for notice in first.notices)
    assert "cancel" in second.notices[0]
    assert verb(folder, tmp_path, "chat", "q.wav", "--reply", "text", "--max-new-tokens", 3) == 0
    assert "note: q.wav: its 2 channels cancel" in capsys.readouterr().err
    assert verb(folder, tmp_path, "encode", "q.wav") == 0
    assert "note: q.wav: its 2 channels cancel" in capsys.readouterr().err


def test_arrays_of_other_types_and_rates_are_the_same_question(system):
    expected = system.reply(question(NOISE), seed=3, reply="text", **SHORT).text
    sixteen = np.rint(NOISE * 32768).astype(np.int16)
    as_float = (sixteen / 32768).astype(np.float32)
    for wave, rate in ((NOISE[None], "16000"), (NOISE[:, None], 16000.0)):
        assert system.reply(question(wave, rate), seed=3, reply="text", **SHORT).text == expected
    replies = [system.reply(question(wave), seed=3, reply="text", **SHORT) for wave in (sixteen, as_float)]
    first, second = (reply.conversation.state.grid for reply in replies)  # with the codes of the question
    np.testing.assert_array_equal(first, second)
    with pytest.raises(MossError, match=r"turn of user: its samples reach .* divide them by 32768"):
        system.reply(question(NOISE * 32767), **SHORT)


def test_the_limit_of_a_system(folder, tmp_path):
    soundfile.write(tmp_path / "q.wav", NOISE, RATE)
    limited = moss_jax.load(folder, context=512, max_audio_bytes=RATE * 2)
    with pytest.raises(MossError, match="exceeds the limit"):
        limited.reply([Turn("user", audio=tmp_path / "q.wav")], reply="text", **SHORT)
    with pytest.raises(MossError, match="exceeds the limit"):
        limited.enrol(tmp_path / "q.wav")


@pytest.mark.parametrize("arguments", [["chat", "-", "--reply", "text", "--max-new-tokens", "3"], ["encode", "-"]])
def test_a_question_from_standard_input(arguments, folder, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "q.wav", NOISE, RATE)
    for limit, code in (("2048", 0), ("0", 2)):
        stdin = types.SimpleNamespace(buffer=io.BytesIO((tmp_path / "q.wav").read_bytes()), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert verb(folder, tmp_path, *arguments, "--max-audio-mib", limit) == code
    assert "standard input: exceeds the limit" in capsys.readouterr().err


def test_a_file_and_the_raw_stream_of_a_reply_hold_the_same_samples(folder, tmp_path, capfdbinary):
    asked = ["chat", "--text", "Hi", "--max-new-tokens", "5", "--min-new-tokens", "5", "--seed", "3"]
    assert verb(folder, tmp_path, *asked, "-o", tmp_path / "a.wav") == 0
    capfdbinary.readouterr()
    assert verb(folder, tmp_path, *asked, "-o", "-") == 0
    raw = np.frombuffer(capfdbinary.readouterr().out, "<i2")
    np.testing.assert_array_equal(soundfile.read(tmp_path / "a.wav", dtype="int16")[0], raw)
    assert len(raw) == 5 * 1920

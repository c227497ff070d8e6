"""The whole pipeline on a tiny random system: four combinations, streams, voices, conversations, batches, the verbs."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import moss_jax
from moss_jax.audio.features import mel_24k
from moss_jax.audio.wave import load_audio, resample
from moss_jax.cli import main
from moss_jax.convert.random_system import init_random
from moss_jax.dialogue.system import Reply
from moss_jax.dialogue.turns import Turn
from moss_jax.dialogue.voice import enrol, load_voice, log_mel, save_voice
from moss_jax.errors import MossError
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_decoder.voice import Voice

WRITTEN = Turn("user", text="How are you? <think>")
SHORT = {"max_new_tokens": 14, "min_new_tokens": 14}  # of a spoken reply: 14 codes


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("systems") / "tiny"
    init_random(path, say=lambda line: None)
    return path


@pytest.fixture(scope="session")
def system(folder):
    return moss_jax.load(folder, context=512)


@pytest.fixture(scope="session")
def recording_file(tmp_path_factory):
    """1.1 s of two tones in noise at 22050 Hz, stereo.

    The noise gives every bin of a log-mel energy: the logarithm of a bin near zero depends on how a processor rounds.
    """
    time = np.arange(24255) / 22050
    wave = 0.3 * np.sin(2 * np.pi * 220 * time) + 0.1 * np.sin(2 * np.pi * 1310 * time)
    wave += np.random.default_rng(0).normal(0, 0.01, len(time))
    path = tmp_path_factory.mktemp("audio") / "question.wav"
    soundfile.write(path, np.stack([wave, 0.5 * wave], 1), 22050)
    return path


@pytest.fixture(scope="session")
def spoken(recording_file):
    return Turn("user", audio=recording_file)


@pytest.mark.slow
def test_speech_to_speech_whole_and_streamed(system, spoken, tmp_path):
    reply = system.reply([spoken], seed=1, **SHORT)
    assert len(reply.codes) == 14 and reply.wave.shape == (14 * 1920,) and reply.sample_rate == 24000
    assert not reply.complete
    assert len(reply.notices) == 2
    assert "speaking with the zero voice" in reply.notices[0]
    assert reply.notices[1] == "the reply was cut off after 14 rows (max_new_tokens is 14)"
    reply.save(tmp_path / "answer.wav")
    assert soundfile.info(tmp_path / "answer.wav").frames == 14 * 1920
    stream = system.stream([spoken], seed=1, **SHORT)
    pieces = [piece.wave for piece in stream]
    assert len(pieces) > 1
    np.testing.assert_array_equal(stream.reply.codes, reply.codes)
    np.testing.assert_array_equal(np.concatenate(pieces), stream.reply.wave)
    assert stream.reply.wave.shape == reply.wave.shape
    assert stream.reply.notices == reply.notices
    assert not np.array_equal(system.reply([spoken], seed=2, **SHORT).codes, reply.codes)


def test_text_to_text_whole_and_streamed(system):
    reply = system.reply([WRITTEN], reply="text", max_new_tokens=40)
    assert reply.text and reply.wave is None
    stream = system.stream([WRITTEN], reply="text", max_new_tokens=40)
    assert "".join(piece.text for piece in stream) == reply.text == stream.reply.text
    with pytest.raises(MossError, match="not written, the reply is a written one"):
        reply.save("x.wav")


def test_three_turns_of_every_kind_and_a_saved_conversation(system, spoken, tmp_path):
    first = system.reply([spoken], reply="text", max_new_tokens=9)
    second = system.reply([WRITTEN], conversation=first.conversation, **SHORT)
    second.conversation.save(tmp_path / "talk.safetensors")
    stream = system.stream([spoken], conversation=second.conversation, **SHORT)
    assert sum(piece.wave.size for piece in stream) == 14 * 1920
    third = system.reply([spoken], conversation=system.resume(tmp_path / "talk.safetensors"), **SHORT)
    np.testing.assert_array_equal(third.codes, stream.reply.codes)
    assert third.conversation.roles.tolist() == [0, 1, 2, 1, 2, 1, 2]
    with pytest.raises(MossError, match="already been continued"):
        system.reply([WRITTEN], conversation=second.conversation)


@pytest.mark.slow
def test_a_batch_in_order(system, spoken):
    questions = [[WRITTEN], [spoken], [WRITTEN, Turn("assistant", codes=[1, 2]), spoken]]
    replies = list(system.reply_batch(questions, batch_size=2, seed=5, **SHORT))
    assert [len(reply.codes) for reply in replies] == [14] * 3
    alone = system.reply([WRITTEN], seed=5, **SHORT)
    np.testing.assert_array_equal(replies[0].codes, alone.codes)
    np.testing.assert_allclose(replies[0].wave, alone.wave, atol=1e-5)


def test_an_array_equals_a_file(system, spoken, recording_file):
    wave, rate = soundfile.read(recording_file)
    array = Turn("user", audio=wave, sample_rate=rate)
    (from_file,), _ = system._with_codes([[spoken]])
    (from_array,), _ = system._with_codes([[array]])
    np.testing.assert_array_equal(from_file[0].codes, from_array[0].codes)
    for bad, message in (
        (np.zeros(0), "holds 0 samples, expected at least one"),
        (np.zeros((2, 2, 2)), r"shape \[2, 2, 2\], expected"),
        (np.zeros(9, int), "dtype int64, expected floats"),
    ):
        with pytest.raises(MossError, match=message):
            system.reply([Turn("user", audio=bad, sample_rate=16000)])


@pytest.mark.slow
def test_a_voice_is_enrolled_kept_and_used(system, recording_file, tmp_path):
    voice = system.enrol(recording_file)
    wave, rate = load_audio(recording_file)
    (codes,) = system.speech_tokenizer.encode([resample(wave, rate, 16000)])
    mel = np.asarray(mel_24k(jnp.array(resample(wave, rate, 24000))[None]))[0]
    count = min(len(codes), len(mel) // 4)
    np.testing.assert_array_equal(voice.codes, codes[:count])
    np.testing.assert_allclose(voice.mel, mel[: 4 * count], atol=1e-4)
    assert voice.embedding.shape == (192,)
    save_voice(tmp_path / "voice.safetensors", voice)
    again = load_voice(tmp_path / "voice.safetensors", system.speech_decoder.config)
    for name in ("codes", "mel", "embedding"):
        np.testing.assert_array_equal(getattr(again, name), getattr(voice, name))
    plain = system.reply([WRITTEN], **SHORT)
    own = system.reply([WRITTEN], voice=tmp_path / "voice.safetensors", **SHORT)
    np.testing.assert_array_equal(own.codes, plain.codes)
    assert np.abs(own.wave - plain.wave).max() > 1e-3
    assert not any("voice" in notice for notice in own.notices)


def test_files_that_are_not_voices(system, tmp_path):
    with pytest.raises(MossError, match="neither a file nor a voice of the system, which has: none"):
        system.reply([WRITTEN], voice="anna")
    config, parts = system.folder.load(SPEECH_DECODER)
    for samples in (1, 1900):
        with pytest.raises(MossError, match="too short"):
            enrol(np.zeros(samples, np.float32), 24000, system.speech_tokenizer, config, parts["speaker"])
    shutil.copy(system.folder.path / "speech_decoder" / "speaker.safetensors", tmp_path / "no.safetensors")
    with pytest.raises(MossError, match="not a voice"):
        load_voice(tmp_path / "no.safetensors", config)


def test_recordings_too_long_for_a_reply(system, tmp_path, capsys):
    """320 s are 4000 codes; the decoder takes 3750, of which a reply needs 500."""
    noise = np.random.default_rng(0).normal(0, 0.1, 320 * 16000).astype(np.float32)
    for seconds in (320, 261):
        with pytest.raises(MossError, match=f"{seconds} s is too long for a voice, expected 0.08 to 260 s"):
            system.enrol((noise[: int(seconds * 16000)], 16000))
    with pytest.raises(MossError, match=r"0\.05 s is too short to hold speech"):
        system.enrol((noise[:800], 16000))
    soundfile.write(tmp_path / "long.wav", noise, 16000)
    with pytest.raises(MossError, match=r"long.wav: .*too long for a voice"):
        system.enrol(tmp_path / "long.wav")
    code = main(
        ["voice", str(tmp_path / "long.wav"), "--model", str(system.folder.path), "-o", str(tmp_path / "v.safetensors")]
    )
    assert code == 2 and "expected 0.08 to 260 s" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["long.wav"]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (4000, r"long.safetensors: voice: its recording has 4000 codes \(320 s\), expected fewer than the 3750"),
        (3750, "3750 codes"),
        (3740, "max_new_tokens is 500, expected at most 10 with this voice: .* recording has 3740"),
    ],
)
def test_voice_files_too_long_for_a_reply(system, tmp_path, codes, message):
    config = system.speech_decoder.config.flow
    mel = np.zeros((codes * config.frames_per_code, config.mel_bins), np.float32)
    voice = Voice(np.zeros(codes, np.int32), mel, np.ones(config.speaker_size, np.float32))
    save_voice(tmp_path / "long.safetensors", voice)
    with pytest.raises(MossError, match=message):
        system.reply([WRITTEN], voice=tmp_path / "long.safetensors")
    with pytest.raises(MossError, match="recording has" if codes < 3750 else "expected fewer than the 3750"):
        system.reply([WRITTEN], voice=voice)


def test_the_mel_of_a_padded_wave_is_its_own(system):
    wave = np.random.default_rng(0).normal(0, 0.1, 30011).astype(np.float32)
    expected = np.asarray(mel_24k(jnp.array(wave)[None]))[0]
    np.testing.assert_allclose(log_mel(wave, system.speech_decoder.config), expected, atol=1e-4)


def test_a_reply_without_speech(system, tmp_path):
    config = system.language_model.config
    rows = np.array([[config.modality_pad_id, config.eosp_id], [config.im_end_id, config.audio_pad_id]], np.int32)
    request = system._request("speech", None, 0, {})
    empty = system._read_reply(rows, request, complete=True)
    assert empty.complete and empty.notices[-1:] == ("the reply holds no speech: it ended before the first code",)
    reply = Reply("", empty.codes, system._speak(empty.codes, request), 24000, True)
    with pytest.raises(MossError, match="not written, the reply is one without any speech"):
        reply.save(tmp_path / "answer.wav")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": 0}, "temperature is 0, expected a number from 0.001 to 100"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"min_new_tokens": 501}, "min_new_tokens is 501, expected 0 to 500"),
        ({"max_new_tokens": 4000}, "expected at most 3750 with this voice"),
        ({"reply": "song"}, "reply: 'song'"),
        ({"turns": []}, "the list is empty"),
        ({"turns": [Turn("user", codes=[300])]}, "300 is not a speech code"),
        ({"turns": [Turn("user", audio="none.wav")]}, "none.wav: no such file"),
        ({"turns": [Turn("user", codes=[1] * 600)]}, "expected at most 512; shorten the turn"),
    ],
)
def test_bad_requests(system, keywords, message):
    with pytest.raises(MossError, match=message):
        system.reply(**{"turns": [WRITTEN], **keywords})


@pytest.mark.parametrize("broken", ["system.json", "text_tokenizer/tokenizer.json", "transformer/config.json"])
def test_a_folder_that_lacks_something(folder, tmp_path, broken):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / broken).unlink()
    with pytest.raises(MossError, match=broken.rpartition("/")[2]):
        moss_jax.load(copy)
    with pytest.raises(MossError, match="no such folder"):
        moss_jax.load(tmp_path / "none")


def run(capfd, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.slow
def test_the_verbs(folder, recording_file, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MOSS_JAX_CACHE", str(tmp_path / "cache"))
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    model = ("--model", mine, "--max-new-tokens", 14, "--min-new-tokens", 14)
    code, out, err = run(capfd, "chat", "--text", "Hi", *model, "--stream", "-o", tmp_path / "b.flac")
    assert code == 0 and soundfile.info(tmp_path / "b.flac").frames == 14 * 1920
    assert "1.12 s, 14 codes" in err and "zero voice" in err
    code, out, err = run(capfd, "voice", recording_file, "--model", mine, "--name", "anna", "--default")
    assert code == 0 and "anna.safetensors: 13 codes" in err
    assert json.loads((mine / "system.json").read_text())["default_voice"] == "anna"
    code, out, err = run(capfd, "chat", recording_file, *model, "-o", tmp_path / "a.wav")
    assert code == 0 and out == "" and "1.12 s, 14 codes" in err and "cut off" in err and "voice" not in err
    code, out, err = run(capfd, "chat", "--text", "Hi", *model, "--reply", "text", "--seed", 3)
    assert code == 0 and out.strip()
    code, streamed, err = run(capfd, "chat", "--text", "Hi", *model, "--reply", "text", "--seed", 3, "--stream")
    assert code == 0 and streamed == out
    (tmp_path / "questions.jsonl").write_text('{"text": "Hi", "id": "x"}\n{"text": "Ho"}\n')
    code, out, err = run(capfd, "chat", "--jsonl", tmp_path / "questions.jsonl", *model, "-o", tmp_path / "answers")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["id"] for answer in answers] == ["x", "00002"]
    assert all(soundfile.info(answer["audio"]).frames == 14 * 1920 for answer in answers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "-o", "a.wav"], "expected one of QUESTION.wav, --text and --jsonl"),
        (["chat", "q.wav", "--text", "x", "-o", "a.wav"], "expected one of QUESTION.wav, --text and --jsonl"),
        (["chat", "none.wav", "-o", "a.wav"], "none.wav: no such file"),
        (["chat", "text.wav", "-o", "a.wav"], "text.wav: not an audio file"),
        (["chat", "--text", "x"], "-o is needed for a spoken reply"),
        (["chat", "--text", "", "-o", "a.wav"], "empty text"),
        (["chat", "--text", "x", "-o", "a.mp3"], "a.mp3: cannot write .mp3, expected .wav or .flac"),
        (["chat", "--text", "x", "-o", "nowhere/a.wav"], "there is no folder nowhere"),
        (["chat", "--text", "x", "--reply", "song"], "--reply song: expected speech or text"),
        (["chat", "--text", "x", "-o", "a.wav", "--voice", "anna"], "voice 'anna': neither a file nor a voice"),
        (["chat", "--text", "x", "-o", "a.wav", "--temperature", "-1"], "temperature is -1.0"),
        (["chat", "--text", "x", "-o", "a.wav", "--max-new-tokens", "99999"], "max_new_tokens is 99999"),
        (["chat", "--jsonl", "none.jsonl", "-o", "answers"], "none.jsonl: no such file"),
        (["chat", "--jsonl", "text.wav", "-o", "-"], "with --jsonl a folder is needed"),
        (["voice", "none.wav", "-o", "v.safetensors"], "none.wav: no such file"),
        (["voice", "text.wav"], "expected -o VOICE.safetensors, or --name"),
        (["voice", "text.wav", "-o", "v.safetensors", "--default"], "is used together with --name"),
        (["voice", "text.wav", "--name", "../x"], "voice name '../x'"),
    ],
)
def test_bad_input_to_the_verbs(folder, tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSS_JAX_CACHE", str(folder.parent / "cache"))
    (tmp_path / "text.wav").write_text("this is no sound, only words about it")
    code, out, err = run(capfd, *arguments, "--model", folder)
    assert code == 2 and out == ""
    first = err.splitlines()[0]
    assert first.startswith(f"moss-jax {arguments[0]}: ") and message in first
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["text.wav"]

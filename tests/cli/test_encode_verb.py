"""`moss-jax encode`: recordings -> lines of codes."""

import json

import jax
import numpy as np
import pytest

from moss_jax.audio import save_audio
from moss_jax.checkpoint import save_tree
from moss_jax.checkpoint.config_io import write_config
from moss_jax.cli import main
from moss_jax.speech_tokenizer.config import TINY
from moss_jax.speech_tokenizer.encode import SpeechTokenizer
from moss_jax.speech_tokenizer.encoder import init_params


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp("system") / "speech_tokenizer"
    folder.mkdir()
    (folder.parent / "system.json").write_text('{"format": "moss-jax-1", "default_voice": null}')
    (folder / "config.json").write_text(json.dumps(write_config(TINY)))
    save_tree(folder, jax.jit(lambda: init_params(TINY, jax.random.key(0)))())
    return folder.parent


def noise(samples):
    return np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)


def test_a_line_for_each_recording(system, tmp_path, capsys):
    save_audio(tmp_path / "a.wav", noise(24000), 24000)
    save_audio(tmp_path / "b.flac", noise(20000), 16000)
    paths = [str(tmp_path / "a.wav"), str(tmp_path / "b.flac")]
    assert main(["encode", *paths, "--model", str(system), "-o", str(tmp_path / "codes.jsonl")]) == 0
    assert "2 of 2 recordings, 2.2 s of audio" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "codes.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == paths and [line["seconds"] for line in lines] == [1.0, 1.25]
    assert [len(line["codes"]) for line in lines] == [13, 16]
    assert main(["encode", paths[1], "--model", str(system)]) == 0
    assert json.loads(capsys.readouterr().out)["codes"] == lines[1]["codes"]


@pytest.mark.parametrize("wrong", ["audio", "model", "out"])
def test_bad_input_is_reported_in_one_line_and_nothing_is_written(system, tmp_path, capsys, wrong):
    save_audio(tmp_path / "a.wav", noise(1000), 16000)
    (tmp_path / "text.wav").write_text("no sound at all, only words")
    audio = [str(tmp_path / "a.wav")] + [str(tmp_path / "text.wav")] * (wrong == "audio")
    model = str(tmp_path / "nothing") if wrong == "model" else str(system)
    out = tmp_path / "no_such_folder" / "codes.jsonl" if wrong == "out" else tmp_path / "codes.jsonl"
    assert main(["encode", *audio, "--model", model, "-o", str(out)]) == 2
    message = {"audio": "text.wav: not an audio file", "model": "no such folder", "out": "cannot be written"}[wrong]
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("moss-jax encode: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "text.wav"]


def test_the_stream_of_a_loaded_speech_tokenizer(system):
    speech_tokenizer = SpeechTokenizer.load(system / "speech_tokenizer")
    stream = speech_tokenizer.stream(chunk=3)
    codes = np.concatenate([stream.push(noise(7000)), stream.finish()])
    assert len(codes) == len(speech_tokenizer.encode([noise(7000)])[0]) == 6


def test_a_damaged_folder_is_refused(system, tmp_path, capsys):
    save_audio(tmp_path / "a.wav", noise(1000), 16000)
    folder = tmp_path / "system" / "speech_tokenizer"
    folder.mkdir(parents=True)
    (folder.parent / "system.json").write_text('{"format": "moss-jax-1", "default_voice": null}')
    (folder / "config.json").write_text(json.dumps(write_config(TINY) | {"d_model": 31}))
    assert main(["encode", str(tmp_path / "a.wav"), "--model", str(tmp_path / "system")]) == 2
    assert "d_model 31 is not a multiple of encoder_attention_heads 2" in capsys.readouterr().err

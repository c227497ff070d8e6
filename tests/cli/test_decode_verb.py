"""`moss-jax decode`: codes -> sound."""

import json

import numpy as np
import pytest
import soundfile

from moss_jax.cli import main
from moss_jax.convert.random_system import init_random

CODES = [1, 200, 3, 4, 77, 6, 7, 8]


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    pytest.importorskip("moss_jax.dialogue.system")
    folder = tmp_path_factory.mktemp("decode") / "system"
    init_random(folder, say=lambda line: None)
    return folder


@pytest.mark.slow
def test_one_recording_and_several(system, tmp_path, capsys):
    line = {"path": "some/where/a.wav", "codes": CODES}
    (tmp_path / "one.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["decode", str(tmp_path / "one.jsonl"), "--model", str(system), "-o", str(tmp_path / "a.wav")]) == 0
    wave, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 24000 and len(wave) == 1920 * len(CODES)
    errors = capsys.readouterr().err
    assert "zero voice" in errors and "1 of 1: 0.64 s" in errors
    np.save(tmp_path / "codes.npy", np.array(CODES))
    stream = ["decode", str(tmp_path / "codes.npy"), "--model", str(system), "-o", str(tmp_path / "b.flac"), "--stream"]
    assert main(stream) == 0
    assert len(soundfile.read(tmp_path / "b.flac")[0]) == 1920 * len(CODES)
    (tmp_path / "two.jsonl").write_text((json.dumps(line) + "\n") * 2)
    assert main(["decode", str(tmp_path / "two.jsonl"), "--model", str(system), "-o", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1-a.wav", "2-a.wav"]
    np.testing.assert_array_equal(soundfile.read(tmp_path / "out" / "2-a.wav")[0], wave)


@pytest.mark.parametrize(
    "text, options, message",
    [
        ('{"codes": [1, 2]', [], "line 1: not valid JSON"),
        ('{"path": "x"}', [], 'an object with "codes"'),
        ('{"codes": [0.5]}', [], "expected at least one integer"),
        ('{"codes": []}', [], "expected at least one integer"),
        ("", [], "no codes, expected at least one line"),
        ('{"codes": [999999]}', [], "out of range"),
        ('{"codes": [-1]}', [], "out of range"),
        ('{"codes": [1]}', ["--seed", "-1"], "--seed is -1"),
        ('{"codes": [1]}', ["--chunk", "5"], "--stream"),
        ('{"codes": [1]}', ["--stream", "--chunk", "4"], "no flow for chunks of 4"),
        ('{"codes": [1]}', ["-o", "x.txt"], "expected the name of a .wav"),
        ('{"codes": [1]}\n{"codes": [1]}', [], "expected the name of a new folder"),
        ('{"codes": [1]}', ["--voice", "nobody"], "neither a file nor a voice"),
    ],
)
def test_bad_input_is_reported_and_nothing_is_written(system, tmp_path, capsys, text, options, message):
    (tmp_path / "codes.jsonl").write_text(text)
    arguments = ["decode", str(tmp_path / "codes.jsonl"), "--model", str(system), "-o", str(tmp_path / "out.wav")]
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[0]
    assert [p.name for p in tmp_path.iterdir()] == ["codes.jsonl"]

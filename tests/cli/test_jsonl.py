"""JSON lines as other programs write them, in every verb that reads them."""

import json
import os

import numpy as np
import pytest
import soundfile

from moss_jax.cli import main

BOM = b"\xef\xbb\xbf"
SEPARATORS = "one\u2028two\u2029three\x85four"  # what str.splitlines takes for line ends


def lines(*entries: dict) -> bytes:
    """With a byte-order mark, Windows line ends, blank lines and no line end at the end."""
    text = "\r\n\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    return BOM + text.encode()


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def written(name: str, *entries: dict) -> str:
        (tmp_path / name).write_bytes(lines(*entries))
        return name

    return written


def test_chat(system, write, capfd):
    path = write("q.jsonl", {"text": SEPARATORS, "id": "a"}, {"codes": [1, 2]})
    assert main(["chat", "--jsonl", path, "--model", str(system), "--reply", "text", "--max-new-tokens", "3"]) == 0
    assert [json.loads(line)["id"] for line in capfd.readouterr().out.split("\n") if line] == ["a", "00003"]


def test_decode(system, write, tmp_path):
    path = write("c.jsonl", {"codes": [1, 2], "path": "x\u2028.wav"}, {"codes": [3]})
    assert main(["decode", path, "--model", str(system), "-o", "out"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1-x\u2028.wav", "2-3.wav"]


def test_tokenize(system, write, tmp_path):
    path = write("m.jsonl", {"text": SEPARATORS}, {"text": "b"})
    assert main(["tokenize", path, "--model", str(system), "--format", "text", "-o", "data"]) == 0
    assert (tmp_path / "data").is_dir()


def test_encode_manifests(system, write, tmp_path):
    path = write("m.jsonl", {"text": SEPARATORS, "codes": [1]}, {"codes": [2]})
    assert main(["encode", "--manifests", path, "--model", str(system), "-o", "coded"]) == 0
    coded = (tmp_path / "coded" / "m.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in coded if line] == [{"text": SEPARATORS, "codes": [1]}, {"codes": [2]}]


def test_a_recording_whose_name_is_not_utf8(system, tmp_path, monkeypatch, capfd):
    pytest.importorskip("moss_jax.audio.decode")  # opens recordings by file object
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9.wav")
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(8000) / 20), 16000)
    os.rename(tmp_path / "a.wav", name)
    assert main(["encode", name, "--model", str(system), "-o", "codes.jsonl"]) == 0
    assert json.loads((tmp_path / "codes.jsonl").read_text())["path"] == "caf\ufffd.wav"
    assert main(["decode", "codes.jsonl", "--model", str(system), "-o", name]) == 0
    assert (tmp_path / name).stat().st_size > 1000
    assert main(["encode", "none" + name, "--model", str(system)]) == 2
    assert "nonecaf" in capfd.readouterr().err.splitlines()[-1]

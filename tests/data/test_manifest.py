"""Manifests: good lines are read, and every bad line is reported by number."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from moss_jax.data.manifest import Manifest, TarMember, Word
from moss_jax.errors import MossError


@pytest.fixture
def folder(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16000)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(1600), 16000, format="FLAC")
    with tarfile.open(tmp_path / "part.tar", "w") as tar:
        entry = tarfile.TarInfo("talks/7.flac")
        entry.size = len(buffer.getvalue())
        buffer.seek(0)
        tar.addfile(entry, buffer)
    return tmp_path


def write(folder, *lines):
    path = folder / "m.jsonl"
    encoded = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def test_good_lines(folder):
    path = write(
        folder,
        {"audio": "a.wav", "text": "Grüß, Gott!", "words": [["Grüß", 0, 0.5], ["Gott", 0.5, 0.9]], "id": "x"},
        b"",
        {"shard": "part.tar", "audio": "talks/7.flac", "words": [["a", 0, 1], ["b", 1, 2]]},
        {"codes": [3, 4], "words": [["c", 0, 1]]},
    )
    manifest = Manifest(path, "interleaved", code_count=5)
    assert len(manifest) == 3 and manifest.has_audio
    one, two, three = manifest.documents()
    assert (one.name, one.line, two.name, two.line) == ("x", 1, "3", 3)
    assert one.words == (Word("Grüß", 0, 0.5), Word("Gott", 0.5, 0.9)) and one.sounds == (folder / "a.wav",)
    assert two.text == "a b" and two.sounds == (TarMember(folder / "part.tar", "talks/7.flac"),)
    assert three.sounds[0].tolist() == [3, 4]
    assert [d.line for d in manifest.documents(1, 2)] == [3]


def test_turns(folder):
    turns = [{"role": "user", "audio": "a.wav"}, {"role": "assistant", "text": "Yes."}]
    (document,) = Manifest(write(folder, {"turns": turns}), "chat").documents()
    assert [turn.role for turn in document.turns] == ["user", "assistant"] and document.turns[1].text == "Yes."
    assert document.sounds == (folder / "a.wav", None)


WORDS = {"audio": "a.wav", "text": "x y"}
BAD = [
    (b"{", "not valid JSON ("),
    (b"\xff\xfe", "not UTF-8 text (byte 0)"),
    (b"[1]", "holds a JSON list, expected an object"),
    ({"audio": "a.wav", "txt": "x"}, "unknown: txt; expected id, audio"),
    ({}, "is empty: has neither audio, codes, text nor turns"),
    ({"audio": "b.wav"}, "audio b.wav: no such file"),
    ({"audio": "."}, "audio .: is a folder"),
    ({"audio": 3}, "audio is 3, expected a file name"),
    ({"shard": "part.tar"}, "has a shard, but no audio"),
    ({"shard": "none.tar", "audio": "x"}, "none.tar: no such file"),
    ({"shard": "a.wav", "audio": "x"}, "not a readable tar file"),
    ({"shard": "part.tar", "audio": "x"}, "audio x: not in part.tar"),
    ({"audio": "a.wav", "text": "  "}, "text is empty, expected some words"),
    ({"audio": "a.wav", "text": 5}, "text is 5, expected a string"),
    ({"codes": []}, "codes is empty"),
    ({"codes": [1, 80]}, "codes: 80 is not a code of this model, expected 0 to 79"),
    ({"codes": [1, True]}, "codes is not a list of integers"),
    ({"codes": [1], "audio": "a.wav"}, "has audio and codes, expected one of them"),
    ({"audio": "a.wav"}, "has no words (their times), which the format interleaved needs"),
    ({"text": "x"}, "has no audio and no words"),
    ({**WORDS, "words": "x"}, 'words is "x", expected [[word, start, end], ...]'),
    ({**WORDS, "words": [["x", 0]]}, 'words[0] is ["x", 0], expected [word, start, end]'),
    ({**WORDS, "words": [["x", 0, float("nan")]]}, "NaN is not a finite number"),
    ({**WORDS, "words": [["x", 0, 1], ["y", 2, 1.5]]}, "words[1]: 'y' has the times 2 to 1.5 s, expected 0 <= start"),
    ({**WORDS, "words": [["x", 1, 2], ["y", 0.5, 2]]}, "times are not in order, 'y' 0.5 to 2 s follows 'x' 1 to 2 s"),
    ({**WORDS, "words": [["x", 0, 1], ["z", 1, 2]]}, "words[1]: 'z' is not in the text, in this order"),
    ({**WORDS, "id": ""}, "id is '', expected a string or a number"),
    ({"turns": []}, "turns is [], expected a list of turns"),
    ({"turns": [{"role": "assistant", "text": "x"}], "text": "y"}, "has text beside turns"),
    ({"turns": [{"role": "user", "text": "x"}]}, "the last one is the user's, expected the assistant's"),
    ({"turns": [{"role": "nobody", "text": "x"}]}, "turns[0]: turn: role is 'nobody', expected one of"),
    ({"turns": [{"role": "assistant"}]}, "turns[0]: has neither or both of text and speech"),
    ({"turns": [{"role": "assistant", "text": ""}]}, "turns[0]: text is empty"),
    ({"turns": [{"role": "assistant", "audio": "b.wav"}]}, "turns[0]: audio b.wav: no such file"),
    (
        {"turns": [{"role": "user", "text": "x"}, {"role": "system", "text": "x"}, {"role": "assistant", "text": "x"}]},
        "turns[1]: a system turn, expected only as the first turn",
    ),
]


def test_all_bad_lines_are_reported_at_once(folder):
    good = {**WORDS, "words": [["x", 0, 1], ["y", 1, 2]], "id": "same"}
    path = write(folder, good, *(line for line, _ in BAD), good)
    with pytest.raises(MossError) as error:
        Manifest(path, "interleaved", code_count=80)
    first, *message = str(error.value).split("\n")
    assert first == f"{path}: {len(BAD) + 1} bad lines of {len(BAD) + 2}"
    expected = [*(problem for _, problem in BAD), "the id 'same' is already that of line 1"]
    assert [line for line in message if not line.startswith("  line ")] == []
    assert len(message) == len(expected)
    for number, (line, problem) in enumerate(zip(message, expected, strict=True), 2):
        assert line.startswith(f"  line {number}: ") and problem in line, (line, problem)


def test_consecutive_lines_with_one_problem_share_an_entry(folder):
    lines = [{"text": "x"}, {"audio": "a.wav"}, {"text": "x"}, {"text": "x"}, {"text": "x"}, b"{"]
    with pytest.raises(MossError) as error:
        Manifest(write(folder, *lines), "speech")
    message = [line.split(":")[0] for line in str(error.value).split("\n")[1:]]
    assert message == ["  line 1", "  lines 3 to 5", "  line 6"] and "5 bad lines of 6" in str(error.value)


@pytest.mark.parametrize(
    ("format", "needs"),
    [
        ("text", "text"),
        ("asr", "audio and no text"),
        ("chat", "turns"),
        ("speech", "audio"),
    ],
)
def test_what_formats_need(folder, format, needs):
    with pytest.raises(MossError, match=f"line 1: has no {needs}, which the format {format} needs"):
        line = (
            {"audio": "a.wav"}
            if format == "text"
            else {"text": "x"}
            if format != "asr"
            else {"turns": [{"role": "assistant", "text": "x"}]}
        )
        Manifest(write(folder, line), format)


def test_words_may_be_missing_where_they_are_aligned(folder):
    (document,) = Manifest(write(folder, {"audio": "a.wav", "text": "x"}), "interleaved", align=True).documents()
    assert document.words is None


def test_files_that_are_no_manifests(tmp_path):
    for name, content, message in (("none", None, "no such file"), ("empty", b"\n \n", "has no document")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(MossError, match=message):
            Manifest(tmp_path / name, "text")
    with pytest.raises(MossError, match="format 'music': expected one of text, speech"):
        Manifest(tmp_path / "empty", "music")


def test_fingerprints_follow_the_lines(folder):
    manifest = Manifest(write(folder, *({"text": str(n)} for n in range(6))), "text")
    before = [manifest.fingerprint(0, 3), manifest.fingerprint(3, 6)]
    manifest = Manifest(write(folder, *({"text": str(n if n != 4 else "new")} for n in range(6))), "text")
    assert manifest.fingerprint(0, 3) == before[0] and manifest.fingerprint(3, 6) != before[1]

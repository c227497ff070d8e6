import json

import pytest

from moss_jax.dialogue.questions import read_questions
from moss_jax.errors import MossError


def write(tmp_path, *lines):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_every_kind_of_line(tmp_path):
    (tmp_path / "a.wav").touch()
    turns = [{"role": "system", "text": "s"}, {"text": "x"}, {"role": "assistant", "codes": [1]}, {"audio": "a.wav"}]
    path = write(tmp_path, {"text": "hi"}, "", {"id": "b", "audio": "a.wav"}, {"turns": turns, "id": 7})
    first, second, third = read_questions(path, system="be kind")
    assert (first.name, second.name, third.name) == ("00001", "b", "7")
    assert [(turn.role, turn.text) for turn in first.turns] == [("system", "be kind"), ("user", "hi")]
    assert second.turns[1].audio == tmp_path / "a.wav"
    assert [turn.role for turn in third.turns] == ["system", "user", "assistant", "user"]
    assert third.turns[0].text == "s"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no questions, expected"),
        (["{"], r"line 1: .*"),
        (["[1]"], "line 1: holds a JSON list, expected an object"),
        ([{"text": "x"}, {"speech": "x"}], "line 2: unknown: speech"),
        ([{"text": "x", "audio": "none.wav"}], "line 1: audio none.wav: no such file"),
        ([{"audio": 3}], "line 1: audio is 3, expected a file name"),
        ([{"text": " "}], "line 1: turns: the user turn at 0 has empty text"),
        ([{"turns": "x"}], "'turns' must be a list"),
        ([{"turns": [], "text": "x"}], "only 'id' is allowed next to it"),
        ([{"turns": [3]}], "a turn is 3, expected an object"),
        ([{"turns": [{"role": "assistant", "text": "x"}]}], "the last turn is of assistant"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "x"}], "line 2: duplicate id 'a'"),
        ([{"id": "../a", "text": "x"}], "is not a plain file name"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, message):
    with pytest.raises(MossError, match=message) as caught:
        read_questions(write(tmp_path, *lines))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MossError, match="no such file"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MossError, match="binary line 1: not UTF-8 text"):
        read_questions(tmp_path / "binary")

"""Documents from outside: limits, messages and what is read in spite of its spelling."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax import documents
from moss_jax.documents import (
    MAX_DEPTH,
    check_encodable,
    code_list,
    parse_json,
    parse_object,
    plain_name,
    read_json,
    read_lines,
    read_text,
    read_yaml,
    shown,
    text_of,
)
from moss_jax.errors import MossError
from moss_jax.files import check_name, is_file, is_folder

BOM = b"\xef\xbb\xbf"


def one_line(error: MossError) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 2000
    return text


BAD_JSON = {
    "nothing": (b"", "not valid JSON"),
    "cut": (b'{"a": ', "not valid JSON .* at column 7"),
    "second line": (b'{"a": 1,\n "b" 2}', "line 2 column 6"),
    "1000 brackets": (b"[" * 1000 + b"]" * 1000, "nested deeper than 64"),
    "100,000 brackets": (b"[" * 100_000, "nested deeper than 64"),
    "65 levels": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
    "5000 digits": (b"9" * 5000, "a number of 5000 digits"),
    "400 digits": (b"[1, -" + b"9" * 400 + b"]", "a number of 401 digits"),
    "infinite": (b"[1e999]", "not a finite number"),
    "constant": (b'{"a": NaN}', "NaN is not a finite number"),
    "negative constant": (b"[-Infinity]", "not a finite number"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' appears twice"),
    "lone surrogate": (b'{"a": "x\\ud800"}', "lone surrogate"),
    "lone low surrogate": (b'{"a": ["\\uDC00"]}', "lone surrogate"),
    "surrogate in a key": (b'{"\\udfff": 1}', "lone surrogate"),
    "not UTF-8": (b'{"a": "\xff"}', r"not UTF-8 text \(byte 7\)"),
    "not UTF-8, later": (b'{"a": 1,\n\n"b": "\xe9"}', r"not UTF-8 text \(line 3\)"),
    "UTF-16": ("﻿{}".encode("utf-16-le"), "not UTF-8"),
    "raw surrogate": (b'"\xed\xa0\x80"', "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_one_line(name, tmp_path):
    content, message = BAD_JSON[name]
    with pytest.raises(MossError, match=message) as caught:
        parse_json(content)
    one_line(caught.value)
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(MossError, match=rf"x\.json: .*{message}"):
        read_json(path)


def test_what_json_allows_is_read():
    assert parse_json(BOM + b'{"a": "\\ud83d\\ude00", "b": [1e-7, -0, 123456789012345678901234567890]}') == {
        "a": "\U0001f600",
        "b": [1e-7, 0, 123456789012345678901234567890],
    }
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(deepest)) == deepest
    assert parse_json('["' + "[" * 200 + '"]') == ["[" * 200]
    assert parse_json("[1, 2]" + " " * 100 + "\n") == [1, 2]
    assert str(parse_json("[NaN]", finite=False)) == "[nan]"
    with pytest.raises(MossError, match="holds a JSON list, expected an object"):
        parse_object("[]")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=200)
@given(JSON)
def test_what_python_writes_is_read_back(value):
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert parse_json(text) == value
        assert parse_json(BOM + text.encode()) == value


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0d8x1-eE.ntf \n', max_size=60).map(str.encode))
def test_any_bytes_are_a_value_or_one_error(content):
    try:
        parse_json(content)
    except MossError as error:
        one_line(error)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_only_a_newline_ends_a_line(tmp_path, separator):
    text = f"a{separator}b"
    path = tmp_path / "x.jsonl"
    path.write_bytes(BOM + f'{{"t": {json.dumps(text, ensure_ascii=False)}}}\r\n\r\n  \n{{"t": 2}}'.encode())
    lines = list(read_lines(path))
    assert [line.number for line in lines] == [1, 4]
    if separator >= "\x20":  # JSON wants control characters escaped
        assert parse_object(lines[0].content) == {"t": text}
    content = path.read_bytes()
    assert all(content[line.start :].startswith(line.content) for line in lines)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    for read in (read_json, read_text, read_yaml, lambda path: list(read_lines(path))):
        for path, message in (
            (tmp_path / "none", "no such file"),
            (tmp_path, "Is a directory"),
            (tmp_path / ("x" * 300), "File name too long"),
            (tmp_path / "a\0b", "not a name that a file can have"),
            (tmp_path / "\ud800", "not a name that a file can have"),
        ):
            with pytest.raises(MossError, match=message) as caught:
                read(path)
            one_line(caught.value)
    monkeypatch.setattr(documents, "MAX_FILE", 10)
    monkeypatch.setattr(documents, "MAX_LINE", 10)
    (tmp_path / "big").write_text('{"a": 123456}')
    with pytest.raises(MossError, match="has more than 10 bytes"):
        read_json(tmp_path / "big")
    with pytest.raises(MossError, match="big line 1: longer than 10 bytes"):
        list(read_lines(tmp_path / "big"))


def test_names_that_no_file_can_have(tmp_path):
    for name in ("x" * 300, "a\0b", "\ud800", "none"):
        assert not is_file(tmp_path / name) and not is_folder(tmp_path / name)
    for name in ("x" * 300, "a\0b", "\ud800"):
        with pytest.raises(MossError, match="cannot be written"):
            check_name(tmp_path / name)
    check_name(tmp_path / "new")
    check_name(tmp_path)


def yaml_of(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path)


def test_yaml_values_are_plain(tmp_path):
    text = """\
__set_seed1: !apply:os.system ["false"]
rate: 24000   # comment
flow: !new:a.b.C
    vocab_size: 20480
    name: 'mel'
    encoder: !new:a.b.D
        use: True
        chunk: !ref <rate>
        other: !ref <rate> * 2
        nothing: !name:a.b.f
hift: !new:a.E
    rates: [8, 5, 3]
    small: 1e-06
    copy: !ref <flow>
pipeline: [
    !ref <rate>,
    !ref <none>,
]
"""
    flow = {
        "vocab_size": 20480,
        "name": "mel",
        "encoder": {"use": True, "chunk": 24000, "other": "!ref <rate> * 2", "nothing": "!name:a.b.f"},
    }
    assert yaml_of(tmp_path, BOM + text.encode()) == {
        "__set_seed1": ["false"],
        "rate": 24000,
        "flow": flow,
        "hift": {"rates": [8, 5, 3], "small": 1e-06, "copy": flow},
        "pipeline": [24000, "!ref <none>"],
    }
    assert yaml_of(tmp_path, "# nothing\n") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (":::\n\t- [", "not valid YAML .* at line 2 column 1"),
        ("a: [1, 2", "not valid YAML"),
        ("- a", "holds a YAML list"),
        ("a: " + "[" * 1000, "nested deeper than 64"),
        ("a: " + "{b: " * 100 + "1" + "}" * 100, "nested deeper than 64"),
        ("a: !ref <a>", "not valid YAML .*recursive"),
        ("a: !ref <b>\nb: [!ref <a>]", "not valid YAML .*recursive"),
        ("".join(f"a{i}: !ref <a{i + 1}>\n" for i in range(3000)), "nested too deep"),
        ("a: &x [1]\nb:\n  <<: {c: *x}", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("a: 2024-13-45", "a value in it cannot be read"),
        ("a: " + "9" * 5000, "a value in it cannot be read"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        (b"a: \xff", "not UTF-8 text"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path, text, message):
    with pytest.raises(MossError, match=rf"config\.yaml: .*{message}") as caught:
        yaml_of(tmp_path, text)
    one_line(caught.value)


def test_an_alias_bomb_stays_small(tmp_path):
    """Aliases share one value, and a message cuts it short."""
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    assert len(shown(yaml_of(tmp_path, text)["a29"])) < 5000


def test_names_codes_and_text():
    for bad in ("", "../a", "a/b", ".a", "a\0", "x" * 201, None, True, 1.5, [], 10**250):
        with pytest.raises(MossError, match="is not a plain file name") as caught:
            plain_name(bad)
        one_line(caught.value)
    assert [plain_name(name) for name in ("a", 7, "å.b")] == ["a", "7", "å.b"]
    for bad in (None, [], {}, "1", [1, "2"], [True], [1.0], [[1], 2], [2**31], [10**200]):
        with pytest.raises(MossError, match=r"codes are .*, expected at least one integer") as caught:
            code_list(bad)
        one_line(caught.value)
    assert code_list([0, -1]) == [0, -1]
    with pytest.raises(MossError, match=r"^it is not proper text at character 3"):
        check_encodable("caf\udce9", "it")
    check_encodable("café \U0001f600", "it")
    assert text_of(os.fsdecode(b"caf\xe9.wav")) == "caf\ufffd.wav"

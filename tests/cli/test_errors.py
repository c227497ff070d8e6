"""Bad input over all verbs: exit code 2, a first line that says what is wrong and where, no traceback, nothing written.

And odd but legal input, which works. One tiny system serves all; a case that damages it gets a copy of links.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moss_jax.cli import main
from tests.cli.workshop import RATE, Workshop

ONE_CODE = '{"codes": [1]}'
CODES_IN_CODES = '{"codes": [[1], 2]}'
NOT_UTF8 = os.fsdecode(b"caf\xe9")  # as it arrives from the command line
LONG = "x" * 300  # more than a file's name can have


@dataclass(frozen=True)
class Case:
    """`arguments(workshop)` is the command line; the first line on stderr holds every one of `says`."""

    name: str
    arguments: Callable[[Workshop], list[str]]
    says: tuple[str, ...]


def case(name: str, arguments: Callable[[Workshop], str | list[str]], *says: str) -> Case:
    def split(shop: Workshop) -> list[str]:
        words = arguments(shop)
        words = words.split() if isinstance(words, str) else words
        return [word.replace("{system}", str(shop.system)) for word in words]

    return Case(name, split, says)


def chat(name: str, flags: str, *says: str) -> Case:
    return case(name, lambda shop: f"chat --text Hello --model {shop.system} --reply text {flags}", *says)


def chat_with(name: str, model: Callable[[Workshop], str], *says: str) -> Case:
    return case(name, lambda shop: f"chat --text Hello --model {model(shop)} --reply text", *says)


def ask(name: str, wave: Callable[[Workshop], str], *says: str) -> Case:
    return case(name, lambda shop: f"chat {wave(shop)} --model {shop.system} -o answer.wav", *says)


def decode(name: str, codes, *says: str, flags: str = "") -> Case:
    def arguments(shop: Workshop) -> str:
        np.save(shop.path("codes.npy"), np.asarray(codes))
        return f"decode codes.npy --model {shop.system} -o out.wav {flags}"

    return case(name, arguments, *says)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_setting(name: str, value) -> Callable[[bytes], str]:
    return lambda old: json.dumps(json.loads(old) | {name: value})


def with_prefix(old: bytes) -> str:
    """tokenizers cuts the prefix off every part of a merge, also where it is longer than the part."""
    described = json.loads(old)
    described["model"]["continuing_subword_prefix"] = "longer than any token"
    return json.dumps(described)


def with_header(header: bytes, values: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + values


def header(change: Callable[[dict], object], more: dict | None = None) -> Callable[[Workshop], str]:
    """The system with another header in its transformer's file: `change` changes, or returns, the first tensor."""

    def changed(old: bytes) -> bytes:
        end = 8 + int.from_bytes(old[:8], "little")
        tensors = json.loads(old[8:end])
        name = sorted(tensors)[0]
        made = change(tensors[name])
        if made is not None:
            tensors[name] = made
        return with_header(json.dumps(tensors | (more or {})).encode(), old[end:])

    return lambda shop: shop.replaced("transformer/model.safetensors", changed)


def npy_of(count: int) -> bytes:
    """A .npy of a few bytes whose header says that there are `count` codes."""
    head = b"{'descr': '<i8', 'fortran_order': False, 'shape': (%d,), }" % count
    head += b" " * (117 - len(head)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(80)


def tokenize(name: str, line: str, *says: str) -> Case:
    def arguments(shop: Workshop) -> list[str]:
        shop.file("manifest.jsonl", line + "\n")
        return f"tokenize manifest.jsonl --model {shop.system} --format speech -o new".split()

    return case(name, arguments, "manifest.jsonl", *says)


def truncated(shop: Workshop) -> str:
    shop.wave("whole.flac", 0.3 * np.random.default_rng(0).standard_normal(RATE), subtype="PCM_16")
    content = shop.path("whole.flac").read_bytes()
    shop.path("whole.flac").unlink()
    return shop.file("cut.flac", half(content))


def released(shop: Workshop) -> str:
    return str(Path(shop.file("MOSS-Speech/config.json", '{"model_type": "moss_speech"}')).parent)


def lines(*content: str) -> Callable[[Workshop], str]:
    return lambda shop: (
        f"chat --jsonl {shop.file('questions.jsonl', chr(10).join(content))} --model {{system}} -o answers"
    )


def no_special_tokens(content: bytes) -> str:
    return json.dumps(json.loads(content) | {"added_tokens": []})


CASES = [
    # recordings
    ask("no such recording", lambda shop: "nowhere.wav", "nowhere.wav", "no such file"),
    ask("a folder as recording", lambda shop: str(shop.folder), "expected"),
    ask("no samples", lambda shop: shop.wave(samples=[]), "question.wav", "0 samples|no samples"),
    ask("NaN samples", lambda shop: shop.wave(samples=[0, np.nan] * 800, subtype="FLOAT"), "question.wav", "NaN"),
    ask("a text called wav", lambda shop: shop.file("note.wav", "Dear diary\n"), "note.wav"),
    ask("an empty file", lambda shop: shop.file("empty.wav", b""), "empty.wav"),
    ask("a truncated flac", truncated, "cut.flac", "cut short|truncated|damaged|cannot"),
    case("encode a text", lambda shop: f"encode {shop.file('a.mp3', 'no')} --model {{system}} -o codes.jsonl", "a.mp3"),
    case(
        "encode, the second is bad",
        lambda shop: f"encode {shop.wave()} nowhere.wav --model {{system}} -o codes.jsonl",
        "nowhere.wav",
    ),
    # questions
    case("no question", lambda shop: "chat --model {system} -o a.wav", "expected one of"),
    case("text and file", lambda shop: f"chat {shop.wave()} --text Hi --model {{system}} -o a.wav", "expected one of"),
    case("empty text", lambda shop: ["chat", "--text", "", "--model", "{system}", "--reply", "text"], "empty|text"),
    case("white space", lambda shop: ["chat", "--text", " \n", "--model", "{system}", "--reply", "text"], "empty text"),
    chat("unknown reply", "--reply song", "song", "speech or text"),
    case("spoken without -o", lambda shop: "chat --text Hi --model {system}", "-o"),
    case("out in no folder", lambda shop: "chat --text Hi --model {system} -o no/where/a.wav", "no/where"),
    case("out of another kind", lambda shop: "chat --text Hi --model {system} -o answer.doc", ".doc", ".wav"),
    case("text in no folder", lambda shop: "chat --text Hi --model {system} --reply text -o no/a.txt", "no"),
    case("line 2 is not JSON", lines('{"text": "Hi"}', '{"text": '), "questions.jsonl line 2", "not valid JSON"),
    case("line 1 is a list", lines("[1]"), "line 1", "expected an object"),
    case("line 3 names no file", lines('{"text": "a"}', "", '{"audio": "b.wav"}'), "line 3", "b.wav", "no such file"),
    case("line 1, unknown key", lines('{"txt": "a"}'), "line 1", "txt"),
    case("the same id twice", lines('{"text": "a", "id": "x"}', '{"text": "b", "id": "x"}'), "line 2", "x"),
    case("an id that leaves the folder", lines('{"text": "a", "id": "../x"}'), "line 1", "../x"),
    case("no questions", lines(""), "questions.jsonl", "no question"),
    # documents: encodings, limits, types
    case(
        "text that is not UTF-8",
        lambda shop: ["chat", "--text", os.fsdecode(b"\xff\xfe"), "--model", "{system}", "--reply", "text"],
        "text is not proper text",
        "expected UTF-8",
    ),
    case(
        "system turn that is not UTF-8",
        lambda shop: ["chat", "--text", "Hi", "--system", NOT_UTF8, "--model", "{system}", "--reply", "text"],
        "system: text is not proper text",
        "character 3",
    ),
    case(
        "system turn of a file that is not UTF-8",
        lambda shop: [
            *("chat", "--jsonl", shop.file("q.jsonl", '{"text": "a"}'), "--system", NOT_UTF8),
            *("--model", "{system}", "--reply", "text"),
        ],
        "not proper text",
    ),
    case("line 2, half a character", lines('{"text": "a"}', '{"text": "\\ud800"}'), "line 2", "lone surrogate"),
    case("line 1, half a character in a key", lines('{"\\udc00": "a"}'), "line 1", "lone surrogate"),
    case("1000 nested brackets in a line", lines("[" * 1000 + "]" * 1000), "line 1", "nested deeper"),
    case("line 2, a number of 5000 digits", lines('{"text": "a"}', '{"id": ' + "9" * 5000 + "}"), "line 2", "digits"),
    case("line 1, no number", lines('{"text": "a", "id": NaN}'), "line 1", "NaN"),
    case("line 1, a key twice", lines('{"text": "a", "text": "b"}'), "line 1", "appears twice"),
    case("line 1, codes in codes", lines('{"codes": [[1], 2]}'), "line 1", "codes"),
    case("line 1, true as code", lines('{"codes": [1, true]}'), "line 1", "codes"),
    case("line 1, a huge code", lines('{"codes": [1, ' + "9" * 30 + "]}"), "line 1", "codes"),
    case("line 1, codes of half", lines('{"codes": [1.5]}'), "line 1", "codes"),
    case("line 1, text of numbers", lines('{"text": [1]}'), "line 1", "text is list"),
    case("line 1, role of an object", lines('{"turns": [{"role": {}, "text": "a"}]}'), "line 1", "role"),
    case("line 1, turns of an object", lines('{"turns": {}}'), "line 1", "turns"),
    case("line 1, an id of 300 characters", lines('{"text": "a", "id": "' + "x" * 300 + '"}'), "line 1", "file name"),
    case("line 1, an id with NUL", lines('{"text": "a", "id": "a\\u0000b"}'), "line 1", "file name"),
    case("line 1, a recording of 5000 characters", lines('{"audio": "' + "x" * 5000 + '"}'), "line 1", "no such file"),
    case("line 1, a recording with NUL", lines('{"audio": "a\\u0000b"}'), "line 1", "no such file"),
    case(
        "line 1 is not UTF-8",
        lambda shop: f"chat --jsonl {shop.file('q.jsonl', bytes([255, 254]))} --model {{system}} --reply text",
        "line 1",
        "not UTF-8",
    ),
    # names that no file can have
    case("a question of 300 characters", lambda shop: f"chat {LONG} --model {{system}} --reply text", LONG),
    case(
        "a voice of 300 characters",
        lambda shop: f"chat --text Hi --model {{system}} -o a.wav --voice {LONG}",
        "neither a file nor",
    ),
    case("a model of 300 characters", lambda shop: f"chat --text Hi --model {LONG} --reply text", LONG),
    case("a codec of 300 characters", lambda shop: f"convert --model {{system}} --codec {LONG} -o new", LONG),
    case("questions of 300 characters", lambda shop: f"chat --jsonl {LONG} --model {{system}} --reply text", LONG),
    case("out of 300 characters", lambda shop: f"chat --text Hi --model {{system}} -o {LONG}.wav", LONG, "too long"),
    case("codes out of 300 characters", lambda shop: f"encode {shop.wave()} --model {{system}} -o {LONG}", "too long"),
    case("folder of 300 characters", lambda shop: f"init-random {LONG}", LONG, "too long"),
    case("voice to 300 characters", lambda shop: f"voice {shop.wave()} --model {{system}} -o {LONG}", LONG, "too long"),
    case(
        "voice name of 300 characters",
        lambda shop: f"voice {shop.wave()} --model {{system}} --name {LONG}",
        "voice name",
    ),
    case("info of 300 characters", lambda shop: f"info {LONG}", LONG),
    case("codes of 300 characters", lambda shop: f"decode {LONG} --model {{system}} -o a.wav", LONG),
    case("manifest of 300 characters", lambda shop: f"tokenize {LONG} --model {{system}} --format text -o new", LONG),
    tokenize(
        "shard of half a character",
        '{"shard": "\\ud800", "audio": "x"}',
        "bad line",
    ),
    tokenize("shard with NUL", '{"shard": "\\u0000", "audio": "x"}', "bad line"),
    tokenize("shard of 300 characters", '{"shard": "' + "x" * 300 + '", "audio": "x"}', "bad line"),
    tokenize("recording of 5000 characters", '{"audio": "' + "x" * 5000 + '"}', "bad line"),
    tokenize("1000 brackets in a manifest", "[" * 1000, "bad line"),
    case(
        "codes, a list in a list",
        lambda shop: f"decode {shop.file('c.jsonl', ONE_CODE + chr(10) + CODES_IN_CODES)} --model {{system}} -o new",
        "line 2",
        "codes are",
    ),
    case(
        "codes, 1000 brackets",
        lambda shop: f"decode {shop.file('c.jsonl', '[' * 1000)} --model {{system}} -o a.wav",
        "line 1",
        "nested",
    ),
    case(
        "codes, an array that claims more than there is",
        lambda shop: f"decode {shop.file('c.npy', npy_of(2**40))} --model {{system}} -o a.wav",
        "c.npy",
        "not an array",
    ),
    # sampling
    chat("temperature", "--temperature -0.5", "temperature", "-0.5", "0.001 to 100"),
    chat("temperature NaN", "--temperature nan", "temperature", "nan"),
    chat("temperature, no number", "--temperature warm", "--temperature", "warm"),
    chat("top-p 0", "--top-p 0", "top_p|top-p", "1e-06 to 1"),
    chat("top-p 1.5", "--top-p 1.5", "top_p|top-p", "1.5"),
    chat("top-k", "--top-k -1", "top_k|top-k", "-1"),
    chat("max-new-tokens", "--max-new-tokens 0", "max_new_tokens|max-new-tokens", "at least 1"),
    chat("min over max", "--max-new-tokens 5 --min-new-tokens 6", "min_new_tokens|min-new-tokens", "0 to 5"),
    chat("penalty", "--repetition-penalty 0", "repetition_penalty|repetition-penalty"),
    chat("seed", "--seed -1", "seed", "-1"),
    chat("unknown flag", "--tempo 3", "--tempo"),
    case(
        "longer than the noise",
        lambda shop: "chat --text Hi --model {system} -o a.wav --max-new-tokens 3751",
        "3751",
        "3750",
    ),
    chat_with("context overflow", lambda shop: shop.config("transformer", max_position_embeddings=24), "24"),
    # voices
    case("unknown voice", lambda shop: "chat --text Hi --model {system} -o a.wav --voice anna", "anna", "neither"),
    case(
        "voice of another format",
        lambda shop: (
            f"chat --text Hi --model {{system}} -o a.wav --voice "
            f"{shop.file('v.safetensors', (shop.system / 'speech_decoder/speaker.safetensors').read_bytes())}"
        ),
        "v.safetensors",
        "voice",
    ),
    case(
        "voice cut in half",
        lambda shop: (
            f"decode {shop.file('c.jsonl', ONE_CODE)} --model {{system}} -o a.wav --voice "
            f"{shop.file('v.safetensors', half((shop.system / 'speech_decoder/speaker.safetensors').read_bytes()))}"
        ),
        "v.safetensors",
    ),
    case("voice to nowhere", lambda shop: f"voice {shop.wave()} --model {{system}}", "-o VOICE.safetensors"),
    case("voice in no folder", lambda shop: f"voice {shop.wave()} --model {{system}} -o no/v.safetensors", "no"),
    case(
        "voice from a click",
        lambda shop: f"voice {shop.wave(samples=[0.1] * 200)} --model {{system}} -o v.safetensors",
        "question.wav",
        "too short|expected at least",
    ),
    case("voice named as a path", lambda shop: f"voice {shop.wave()} --model {{system}} --name ../x", "../x"),
    # codes
    decode("codes out of range", [1, 256, 3], "codes.npy", "code 256 at position 1", "255"),
    decode("negative codes", [-1], "-1"),
    decode("broken codes", [0.5, 1.0], "codes.npy", "float64"),
    decode("no codes", np.zeros(0, np.int32), "codes.npy", "at least one"),
    decode("codes longer than the noise", np.zeros(3751, np.int32), "3751", "3750"),
    decode("unknown chunk", [1, 2, 3], "7", "5", flags="--stream --chunk 7"),
    decode("chunk without stream", [1, 2, 3], "--stream", flags="--chunk 5"),
    case(
        "codes, line 2",
        lambda shop: f"decode {shop.file('c.jsonl', ONE_CODE + chr(10) + 'nothing')} --model {{system}} -o new",
        "line 2",
    ),
    # systems
    chat_with("no such system", lambda shop: "nowhere", "nowhere", "no such folder"),
    chat_with("no system", lambda shop: str(shop.folder), "neither a system folder", "system.json"),
    chat_with("a file as system", lambda shop: shop.wave(), "question.wav", "expected a folder"),
    chat_with("a released model alone", released, "--codec"),
    chat_with(
        "older format",
        lambda shop: shop.replaced("system.json", lambda old: old.replace(b"jax-1", b"jax-0")),
        "system.json",
        "moss-jax-0",
        "moss-jax-1",
    ),
    chat_with("system.json cut", lambda shop: shop.replaced("system.json", half), "system.json", "JSON"),
    *(
        chat_with(
            f"system.json: {name}",
            lambda shop, change=change: shop.replaced("system.json", change),
            "system.json",
            *says,
        )
        for name, change, says in (
            ("default voice of a number", with_setting("default_voice", 1.5), ("default_voice is float 1.5",)),
            ("default voice of a list", with_setting("default_voice", ["a"]), ("default_voice is list",)),
            ("sampling of a list", with_setting("sampling", [1]), ("sampling is list",)),
            ("format of a list", with_setting("format", [1]), ("format is",)),
            ("1000 brackets", lambda old: b"[" * 1000, ("nested deeper",)),
            ("5000 digits", lambda old: b'{"format": ' + b"9" * 5000 + b"}", ("5000 digits",)),
            ("not UTF-8", lambda old: b"\xff" + old, ("not UTF-8",)),
            ("a list", lambda old: b"[]", ("expected an object",)),
        )
    ),
    chat_with(
        "config.json, 1000 brackets",
        lambda shop: shop.replaced("transformer/config.json", lambda old: b'{"a":' * 1000),
        "config.json",
        "nested",
    ),
    chat_with("config.json, no heads", lambda shop: shop.config("transformer", num_attention_heads=0), "heads is 0"),
    chat_with("config.json, 2**31", lambda shop: shop.config("transformer", head_dim=2**31), "head_dim is 2147483648"),
    chat_with("config.json, 10**30", lambda shop: shop.config("transformer", head_dim=10**30), "head_dim is 1000"),
    chat_with("config.json, layers", lambda shop: shop.config("transformer", num_shared_layers=10**9), "num_shared_l"),
    chat_with("config.json, theta", lambda shop: shop.config("transformer", rope_theta=-1.0), "rope_theta is -1.0"),
    chat_with("header, dtype of a list", header(lambda tensor: tensor.update(dtype=["F32"])), "damaged header"),
    chat_with("header, a huge shape", header(lambda tensor: tensor.update(shape=[0, 2**63])), "damaged header"),
    chat_with("header, 70 dimensions", header(lambda tensor: tensor.update(shape=[1] * 70)), "damaged header"),
    chat_with("header, offsets of text", header(lambda tensor: tensor.update(data_offsets="ab")), "damaged header"),
    chat_with("header, a number as tensor", header(lambda tensor: 5), "damaged header"),
    chat_with("header, metadata of a number", header(lambda tensor: None, {"__metadata__": -1}), "__metadata__"),
    chat_with("header, metadata of null", header(lambda tensor: None, {"__metadata__": None}), "__metadata__"),
    chat_with("header, metadata of numbers", header(lambda tensor: None, {"__metadata__": {"a": 1}}), "__metadata__"),
    chat_with(
        "header, 1000 brackets",
        lambda shop: shop.replaced("transformer/model.safetensors", lambda old: with_header(b'{"a":' * 1000, b"")),
        "model.safetensors",
        "nested deeper",
    ),
    chat_with("a shard of 5000 characters", lambda shop: shop.indexed({"a": "x" * 5000}), "1 shard is missing"),
    chat_with("a shard with NUL", lambda shop: shop.indexed({"a": "a\0b"}), "1 shard is missing"),
    chat_with("a shard of a number", lambda shop: shop.indexed({"a": 5}), "weight_map"),
    chat_with(
        "text tokenizer that makes its library panic",
        lambda shop: shop.replaced("text_tokenizer/tokenizer.json", with_prefix),
        "tokenizer.json: not a",
    ),
    chat_with("no text tokenizer", lambda shop: shop.without("text_tokenizer"), "text_tokenizer"),
    chat_with(
        "text tokenizer cut",
        lambda shop: shop.replaced("text_tokenizer/tokenizer.json", half),
        "r.json: not valid",
    ),
    chat_with(
        "no special tokens",
        lambda shop: shop.replaced("text_tokenizer/tokenizer.json", no_special_tokens),
        "added tokens",
    ),
    chat_with("no weights", lambda shop: shop.without("transformer/model.safetensors"), "transformer"),
    chat_with("a missing shard", lambda shop: shop.sharded(), "model-00002-of-00002.safetensors"),
    chat_with(
        "a shard cut in half",
        lambda shop: shop.replaced("transformer/model.safetensors", half),
        "model.safetensors",
        "cut|truncated|safetensors",
    ),
    chat_with(
        "wrong shape",
        lambda shop: shop.tensors("transformer/model.safetensors", lambda t: {k: v[..., :-1] for k, v in t.items()}),
        "do not fit",
    ),
    chat_with(
        "one tensor missing",
        lambda shop: shop.tensors("transformer/model.safetensors", lambda t: {k: t[k] for k in sorted(t)[1:]}),
        "1 parameter does not fit",
    ),
    chat_with("unknown field", lambda shop: shop.config("transformer", depth=3), "config.json", "depth"),
    chat_with("wrong type", lambda shop: shop.config("transformer", hidden_size="64"), "config.json", "hidden_size"),
    chat_with(
        "contradicting config",
        lambda shop: shop.config("transformer", num_attention_heads=3),
        "config.json",
        "3 attention heads",
    ),
    case(
        "contradicting encoder",
        lambda shop: f"encode {shop.wave()} --model {shop.config('speech_tokenizer', d_model=33)}",
        "d_model",
    ),
    case(
        "a flow without middle stages",
        lambda shop: (
            f"decode {shop.file('c.jsonl', ONE_CODE)} -o a.wav --model "
            f"{shop.nested('speech_decoder', 'flow', 'estimator', num_mid_stages=0)}"
        ),
        "config.json",
        "num_mid_stages is 0, expected at least 1",
    ),
    case(
        "no speech tokenizer",
        lambda shop: f"encode {shop.wave()} --model {shop.without('speech_tokenizer')}",
        "speech_tokenizer",
    ),
    case(
        "no vocoder",
        lambda shop: (
            f"decode {shop.file('c.jsonl', ONE_CODE)} -o a.wav "
            f"--model {shop.without('speech_decoder/vocoder.safetensors')}"
        ),
        "vocoder.safetensors",
    ),
    # tools
    case("unknown verb", lambda shop: "sing", "sing", "chat"),
    case("init into a full folder", lambda shop: f"init-random {Path(shop.file('full/x', '')).parent}", "full"),
    case("unknown size", lambda shop: "init-random new --size huge", "huge", "tiny"),
    case("unknown layout", lambda shop: "init-random new --layout flat", "flat", "released"),
    case(
        "export into a full folder",
        lambda shop: f"convert --model {{system}} --export qwen3 -o {Path(shop.file('full/x', '')).parent}",
        "full",
    ),
    case("convert what", lambda shop: "convert --model {system} -o new", "--codec"),
    case("convert no release", lambda shop: "convert --model {system} --codec {system} -o new", "tokenizer.json"),
    case("info of nothing", lambda shop: "info nowhere", "nowhere"),
    case("info of a wave", lambda shop: f"info {shop.wave()}", "question.wav"),
    case("unknown topology", lambda shop: "compile decode --topology tall", "tall", "v5e:2x4"),
    case("unknown function", lambda shop: "compile dream", "dream", "decode"),
    case("bench without reference", lambda shop: "bench flow --size tiny --reference nowhere", "nowhere"),
    case("bench of an unknown size", lambda shop: "bench lm --size huge", "huge", "tiny"),
    case("parity of nothing", lambda shop: "parity nowhere.safetensors", "nowhere.safetensors", "no such file"),
    case("parity of a text", lambda shop: f"parity {shop.file('g.safetensors', 'x' * 99)}", "g.safetensors"),
    case(
        "parity of a voice",
        lambda shop: f"parity {shop.system}/speech_decoder/speaker.safetensors",
        "speaker.safetensors",
        "golden-1",
    ),
]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def run(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stopped:  # argparse
        return stopped.code


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case, system, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments = case.arguments(Workshop(tmp_path, system))
    before = contents(tmp_path)
    theirs = contents(system)
    code = run(arguments)
    error = capfd.readouterr().err
    print(error)
    assert code == 2
    assert error.startswith("moss-jax") and "Traceback" not in error
    for pattern in case.says:
        assert re.search(pattern, error.splitlines()[0]), f"{pattern!r} is not in the first line"
    assert contents(tmp_path) == before and contents(system) == theirs


@pytest.mark.parametrize("arguments", ["chat", "encode nowhere.wav --model .", "info nowhere", "chat --top-k many"])
def test_a_real_process_shows_no_traceback(arguments, tmp_path):
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "moss_jax", *arguments.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"moss-jax {arguments.split()[0]}: ")
    assert not done.stdout and "Traceback" not in done.stderr and not contents(tmp_path)


def sine(count: int, channels: int = 1):
    return 0.1 * np.sin(np.arange(count * channels) / 20).reshape(count, channels)


@pytest.mark.parametrize(
    ("samples", "rate", "kind", "codes"),
    [
        (np.zeros((8000, 1)), RATE, "PCM_16", 7),  # silence
        (sine(8000), RATE, "PCM_U8", 7),
        (sine(48000, 6), 96000, "PCM_24", 7),
        (sine(4000), 8000, "ULAW", 7),
        (sine(1), RATE, "PCM_16", 1),
        (3.0 * sine(8000), RATE, "FLOAT", 7),
    ],
    ids=["silence", "8 bits", "6 channels at 96 kHz", "telephone", "one sample", "loud"],
)
def test_odd_recordings_are_encoded(samples, rate, kind, codes, system, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    wave = Workshop(tmp_path, system).wave("odd.wav", samples, rate, kind)
    assert run(["encode", wave, "--model", str(system)]) == 0
    made = json.loads(capfd.readouterr().out)["codes"]
    assert len(made) == codes and min(made) >= 0 and max(made) < 256


@pytest.mark.parametrize(
    "text",
    ["<|im_end|> <think><|object_ref_start|> <|endoftext|>", "word " * 180, "\u4f60\u597d \U0001f600 \x00"],
    ids=["special strings", "long", "other scripts"],
)
def test_odd_texts_are_answered(text, system, capfd):
    arguments = ["chat", "--text", text, "--model", str(system), "--reply", "text", "--max-new-tokens", "3"]
    assert run(arguments) == 0
    assert "Traceback" not in capfd.readouterr().err

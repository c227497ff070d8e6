"""Damaged JSON lines: questions of `chat --jsonl`, manifests of `tokenize`, codes of `decode`, those in a .npy too.

What a reader accepts is used as the verbs use it: written turns become rows, names become file names and output.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from moss_jax.data.manifest import FORMATS, Manifest
from moss_jax.dialogue.grid import prompt_grid
from moss_jax.dialogue.questions import read_questions
from moss_jax.files import write_text
from moss_jax.speech_decoder.codes import read_codes
from moss_jax.speech_lm import TINY
from tests.fuzz import audio, text
from tests.fuzz.documents import CHANGES, changed, json_text
from tests.fuzz.edits import edited, edits

CONVERSATION = {"turns": [{"role": "user", "audio": "a.wav"}, {"role": "assistant", "text": "Yes."}]}
TRANSCRIBED = {"audio": "a.wav", "text": "Good day.", "words": [["Good", 0.1, 0.2], ["day", 0.2, 0.3]]}
SHARD = {"shard": "x.tar", "audio": "a.wav", "text": "Hello"}
# Lines that a reader accepts; the manifests are those of each format.
LINES = {
    "questions": (
        {"text": "Good morning."},
        {"id": "x", "audio": "a.wav"},
        {"turns": [{"role": "system", "text": "Be brief."}, {"role": "user", "codes": [1, 2, 3]}]},
    ),
    "codes": ({"path": "a.wav", "codes": [1, 2, 3]},),
    "text": ({"text": "Good morning.", "id": 7},),
    "speech": ({"id": "x", "audio": "a.wav"}, SHARD),
    "interleaved": (TRANSCRIBED,),
    "continuation": (SHARD, {"codes": [1, 2, 3]}),
    "asr": (TRANSCRIBED, SHARD),
    "tts": (SHARD,),
    "chat": (CONVERSATION,),
    "decoder": (TRANSCRIBED, CONVERSATION),
}
READERS = (*["questions"] * 4, *["codes"] * 2, *FORMATS)
SEPARATORS = (*["\n"] * 6, "\r\n", "\r", "\u2028", "\n\n", "")
ENCODINGS = (*["utf-8"] * 6, "utf-8-sig", "utf-16", "latin-1")

LINE_CASES = st.fixed_dictionaries(
    {
        "reader": st.sampled_from(READERS),
        "lines": st.lists(
            st.tuples(st.integers(0, 5), st.one_of(st.just([]), CHANGES, CHANGES)), min_size=1, max_size=2
        ),
        "separator": st.sampled_from(SEPARATORS),
        "encoding": st.sampled_from(ENCODINGS),
        "ascii": st.booleans(),
        "edits": st.one_of(st.just([]), st.just([]), st.just([]), edits(2)),
    }
)
# The header of a .npy is text: a Python dictionary.
ARRAY_CASES = st.fixed_dictionaries(
    {
        "array": st.sampled_from(["int64", "int32", "uint8", "float32", "complex64", "bool", "U3", "i4,f4", "M8[s]"]),
        "shape": st.sampled_from([(3,), (0,), (), (2, 2)]),
        "fortran": st.booleans(),
        "header": st.one_of(
            st.none(),
            st.sampled_from(
                [
                    "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
                    "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }",
                    "{'descr': '<i8', 'fortran_order': False, 'shape': (-3,), }",
                    "{'descr': '<i8', 'fortran_order': False, 'shape': (9" + "9" * 4400 + ",), }",
                    "(" * 5000 + ")" * 5000,
                ]
            ),
        ),
        "edits": edits(3),
    }
)
CASES = st.one_of(LINE_CASES, LINE_CASES, LINE_CASES, ARRAY_CASES)


def run(case: dict, folder: Path) -> None:
    (folder / "d").mkdir()
    if "array" in case:
        path = folder / "codes.npy"
        path.write_bytes(_npy(case))
        _codes(path)
        return
    (folder / "a.wav").write_bytes(audio.encoded("wav"))
    with tarfile.open(folder / "x.tar", "w") as tar:
        member = tarfile.TarInfo("a.wav")
        member.size = len(audio.encoded("wav"))
        tar.addfile(member, io.BytesIO(audio.encoded("wav")))
    good = LINES[case["reader"]]
    lines = [json_text(changed(good[i % len(good)], changes), case["ascii"]) for i, changes in case["lines"]]
    errors = "surrogatepass" if case["encoding"].startswith("utf") else "replace"
    content = case["separator"].join(lines).encode(case["encoding"], errors)
    path = folder / "lines.jsonl"
    path.write_bytes(edited(content, case["edits"]))
    if case["reader"] == "questions":
        _questions(path)
    elif case["reader"] == "codes":
        _codes(path)
    else:
        _manifest(path, case["reader"])


def _npy(case: dict) -> bytes:
    array = np.zeros(case["shape"], np.dtype(case["array"]), order="F" if case["fortran"] else "C")
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    content = buffer.getvalue()
    if case["header"] is not None:
        header = case["header"].encode()
        content = content[:6] + b"\x02\x00" + len(header).to_bytes(4, "little") + header + content[128:]
    return edited(content, case["edits"])


def _questions(path: Path) -> None:
    for question in read_questions(path, system="Be kind."):
        turns = [turn for turn in question.turns if turn.audio is None]
        prompt_grid(turns, "speech", text.tokenizer(), TINY)
        _output(question.name, path.parent)


def _codes(path: Path) -> None:
    for name, codes in read_codes(path):
        assert codes.ndim == 1
        assert codes.dtype.kind in "iu"
        _output(name, path.parent)


def _manifest(path: Path, kind: str) -> None:
    manifest = Manifest(path, kind, code_count=TINY.eosp_id)
    for document in manifest.documents():
        written = [turn for turn in document.turns if turn.text]
        prompt_grid(written, "text", text.tokenizer(), TINY)
        text.tokenizer().encode(document.text or "")
        document.name.encode()
    manifest.fingerprint(0, len(manifest))


def _output(name: str, folder: Path) -> None:
    """The name of an answer is printed as JSON and used as a file name."""
    json.dumps({"id": name}, ensure_ascii=False).encode()
    write_text(folder / "d" / f"{name}.txt", name)

"""The fuzzer itself: every kind of failure is reported with its case, and the next case still runs."""

import pickle

import pytest

from tests.fuzz import hunt as hunting
from tests.fuzz.hunt import hunt

TARGET = """
import ctypes, os, time
from hypothesis import strategies as st
from moss_jax.errors import MossError

CASES = st.sampled_from(["good", "refused", KIND])

def run(case, folder):
    (folder / "input").write_text(case)
    if case == "refused":
        raise MossError("refused")
    if case == "wrong":
        raise KeyError(case)
    if case == "segfault":
        ctypes.string_at(0)
    if case == "exit":
        os._exit(3)
    if case == "hang":
        time.sleep(60)
    if case == "large":
        content = b"x" * 2**30
"""


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("good", None),
        ("wrong", "KeyError at "),
        ("segfault", "Crash: signal 11"),
        ("exit", "Crash: exit code 3"),
        ("hang", "Hang: "),
        ("large", "Memory: "),
    ],
)
def test_each_kind_of_failure_is_found(kind, what, tmp_path, monkeypatch):
    (tmp_path / f"{kind}_target.py").write_text(TARGET.replace("KIND", repr(kind)))
    monkeypatch.syspath_prepend(tmp_path)
    if kind == "hang":
        monkeypatch.setattr(hunting, "HANG", 1.0)
    result = hunt(f"{kind}_target", 1, 2**29, tmp_path)
    assert result.cases > 0
    assert (result.peak > 2**29) == (kind == "large")
    if what is None:
        assert result.findings == []
    for finding in result.findings:
        assert finding.what.startswith(what)
        assert pickle.loads((finding.folder / "case.pickle").read_bytes()) == kind
        assert (finding.folder / "files" / "input").read_text() == kind
    assert bool(result.findings) == (what is not None)
    assert not list(tmp_path.glob(".*"))

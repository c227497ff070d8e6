"""In CI a skip that tests/allowed_skips.toml does not list fails the session."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def session(folder, body, kind, *arguments):
    """Runs pytest in a folder with the conftest of these tests and one module: exit code and output."""
    tests = folder / "tests"
    tests.mkdir()
    for name in ("__init__.py", "conftest.py", "flags.py", "allowed_skips.toml"):
        shutil.copy(TESTS / name, tests)
    (tests / "test_it.py").write_text(f"import pytest\n\n\n{body}")
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "MOSS_JAX_CI": kind}
    command = [sys.executable, "-m", "pytest", "tests", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


PASSES = "def test_passes():\n    pass\n\n\n"
MODULE = 'pytest.importorskip("no_such_package")\n'
MARK = '@pytest.mark.skipif(True, reason="no such thing")\ndef test_marked():\n    pass\n'
GOLDEN = 'def test_golden():\n    pytest.skip("no golden file lm/forward")\n'
TORCH = "def test_torch():\n    pytest.skip(\"could not import 'torch': No module named 'torch'\")\n"
XFAIL = "@pytest.mark.xfail\ndef test_expected():\n    raise AssertionError\n"


@pytest.mark.parametrize(
    "body, kind, code, message",
    [
        (PASSES + MARK + GOLDEN, "all", 1, "test_it.py::test_marked: no such thing"),
        (PASSES + GOLDEN + XFAIL, "all", 0, "1 skipped"),
        (PASSES + TORCH, "all", 1, "could not import 'torch'"),
        (PASSES + TORCH, "without-torch", 0, "1 skipped"),
    ],
)
def test_skips_are_allowed_by_the_list(tmp_path, body, kind, code, message):
    exit_code, output = session(tmp_path, body, kind)
    assert exit_code == code and message in output, output


@pytest.mark.parametrize("body", [MODULE + PASSES, PASSES + MARK], ids=["module", "test"])
def test_skips_of_workers_are_seen(tmp_path, body):
    exit_code, output = session(tmp_path, body, "all", "-n", "2")
    assert exit_code == 1 and "1 skipped for a reason that allowed_skips.toml does not list" in output, output

"""Settings and fixtures of all tests: compilation, the skips allowed in CI, golden files and recordings."""

import fnmatch
import gc
import os
import shutil
import tempfile
import tomllib
from pathlib import Path

from tests.flags import QUICK

os.environ.setdefault("XLA_FLAGS", QUICK)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # no source lines in compiled programs
gc.set_threshold(100_000, 50, 100)  # tracing allocates many small objects, few of them garbage
# All processes share one compilation cache: workers and child processes inherit the environment of the first.
COMPILED = "JAX_COMPILATION_CACHE_DIR"
OWNER = COMPILED not in os.environ
if OWNER:
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="moss-jax-compiled-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Broadcasting between arrays of different rank is an error, in child processes too: it hides mistakes in shapes.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

import jax  # noqa: E402, after the flags
import pytest  # noqa: E402

CI = "MOSS_JAX_CI"  # set by .ci/run: a skip that is not on the list fails the session
ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.toml")
SHARED = Path(__file__).resolve().parents[2] / "shared"

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items):
    """Moves the notebooks, which take longest, to the start, so that no worker runs one alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def pytest_sessionfinish():
    if OWNER:
        shutil.rmtree(os.environ[COMPILED], ignore_errors=True)


def pytest_configure(config):
    # Workers of pytest-xdist send their reports to the session that started them, and only that one checks them.
    if CI in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipGuard(os.environ[CI]))


class SkipGuard:
    """Fails a session in which a test was skipped for a reason that tests/allowed_skips.toml does not list."""

    def __init__(self, kind: str):
        entries = tomllib.loads(ALLOWED_SKIPS.read_text())["skip"]
        self.allowed = [entry["message"] for entry in entries if entry.get("when", kind) == kind]
        self.refused: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self._check(report)

    def pytest_collectreport(self, report):
        if report.skipped:
            self._check(report)

    def _check(self, report):
        message = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        message = message.removeprefix("Skipped: ")
        if not any(fnmatch.fnmatchcase(message, pattern) for pattern in self.allowed):
            self.refused.append(f"{report.nodeid}: {message}")

    def pytest_sessionfinish(self, session):
        if self.refused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.refused:
            count = len(self.refused)
            terminalreporter.section(f"{count} skipped for a reason that {ALLOWED_SKIPS.name} does not list")
            for line in self.refused:
                terminalreporter.line(line)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Puts the cache of the verbs into a temporary folder instead of the home directory."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "compiled").symlink_to(os.environ[COMPILED])  # the compilation cache of the verbs
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSS_JAX_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def golden():
    """Path of a golden file, such as golden("lm/split_forward"). Without the file the test is skipped."""

    def find(name: str) -> Path:
        path = SHARED / "golden" / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"no golden file {name}")
        return path

    return find


@pytest.fixture(scope="session")
def recording():
    """Path of a real recording, such as recording("prompt_en.wav"). Without the file the test is skipped."""

    def find(name: str) -> Path:
        path = SHARED / "audio" / name
        if not path.is_file():
            pytest.skip(f"no recording {name}")
        return path

    return find

"""Where the larger references are, for the tests that use them when they are present."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

from tests.flags import QUICK

os.environ.setdefault("XLA_FLAGS", QUICK)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # programs without the lines that they come from
gc.set_threshold(100_000, 50, 100)  # tracing makes many small objects, few of them garbage
# And what one process has compiled the others need not: workers inherit the first one's environment.
COMPILED = "JAX_COMPILATION_CACHE_DIR"
OWNER = COMPILED not in os.environ
if OWNER:
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="moss-jax-compiled-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402, after the flags
import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items):
    """The notebooks take longest: they come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def pytest_sessionfinish():
    if OWNER:
        shutil.rmtree(os.environ[COMPILED], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keeps what the verbs convert and compile out of the home directory."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "compiled").symlink_to(os.environ[COMPILED])  # where the verbs keep what they compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSS_JAX_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def golden():
    """Path of a golden file, such as golden("lm/split_forward"); the test is skipped where there is none."""

    def find(name: str) -> Path:
        path = SHARED / "golden" / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"no golden file {name}")
        return path

    return find


@pytest.fixture(scope="session")
def recording():
    """Path of a real recording, such as recording("prompt_en.wav"); the test is skipped where there is none."""

    def find(name: str) -> Path:
        path = SHARED / "audio" / name
        if not path.is_file():
            pytest.skip(f"no recording {name}")
        return path

    return find

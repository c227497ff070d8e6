"""Where the larger references are, for the tests that use them when they are present."""

import os
from pathlib import Path

# Most of the time goes into compiling tiny models: half of it is saved by not optimising them.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", QUICK)

import jax  # noqa: E402, after the flags
import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keeps what the verbs convert and compile out of the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSS_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
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

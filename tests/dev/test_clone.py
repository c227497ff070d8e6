"""The developer verbs outside a clone of the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moss_jax

PACKAGE = Path(moss_jax.__file__).parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with a copy of the package, as in site-packages: `dev/` is not beside it."""
    folder = tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.wav", "*.json")
    shutil.copytree(PACKAGE, folder / "moss_jax", ignore=ignored)
    return folder


@pytest.mark.parametrize("words", [["parity", "file.safetensors"], ["bench", "lm"]], ids=lambda words: words[0])
def test_an_installed_package_refuses_developer_verbs_in_one_line(installed, tmp_path, words):
    run = subprocess.run(
        [sys.executable, "-m", "moss_jax", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.splitlines() == [
        f"moss-jax {words[0]}: the developer tools (dev/{words[0]}) are not installed; "
        "run it in a clone of the repository"
    ]

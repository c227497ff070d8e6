"""One tiny system for the tests of the command line."""

import pytest

from moss_jax.cli import main


@pytest.fixture(scope="session")
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors") / "system"
    assert main(["init-random", str(folder)]) == 0
    return folder

"""Small systems and releases, shared by tests that do not change them."""

import pytest

from moss_jax.convert.random_system import init_random


@pytest.fixture(scope="session")
def random(tmp_path_factory):
    """A tiny random system."""
    folder = tmp_path_factory.mktemp("random") / "system"
    init_random(folder, say=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """The same weights as the two released folders."""
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("released") / "both"
    init_random(folder, layout="released", say=lambda line: None)
    return folder

"""A fixture for the conftest of a folder: broadcasting between arrays of different rank is an error in its tests."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def explicit_ranks():
    before = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "raise")
    yield
    jax.config.update("jax_numpy_rank_promotion", before)

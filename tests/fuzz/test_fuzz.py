"""A small fixed set of cases of every target; `python -m tests.fuzz` runs more."""

import importlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from moss_jax.errors import MossError
from tests.fuzz import TARGETS

EXAMPLES = {"audio": 300, "tensors": 200, "lines": 200, "systems": 25, "text": 100, "sampling": 60}


@pytest.mark.parametrize("name", TARGETS)
def test_only_moss_error_is_raised(name, tmp_path):
    target = importlib.import_module(f"tests.fuzz.{name}")

    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.CASES)
    def check(case):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            try:
                target.run(case, Path(folder))
            except MossError as error:
                assert str(error)

    check()

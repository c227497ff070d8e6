"""The helper that counts compilations."""

from functools import partial

import jax
import numpy as np

from tests.compilations import compilations


def test_compilations_are_counted_by_function():
    @partial(jax.jit, static_argnames="times")
    def repeat(x, times):
        return x * times

    @jax.jit
    def twice(x):
        return repeat(x, times=2)

    with compilations() as compiled:
        repeat(np.zeros(3), times=2)
        twice(np.zeros(3))
        assert compiled == ["repeat", "twice"]
        repeat(np.ones(3), times=2)
        twice(np.ones(3))
        assert compiled == ["repeat", "twice"]
        repeat(np.ones(4), times=2)
        repeat(np.ones(4), times=3)
        assert compiled == ["repeat", "twice", "repeat", "repeat"]
    repeat(np.ones(5), times=2)
    assert len(compiled) == 4

"""Packing: every row of every example exactly once, no row too long, few empty places."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.data.pack import pack_block, plan_packing

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=120)


def seeded(seed=0):
    return np.random.default_rng(seed)


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 90), st.integers(0, 5))
def test_nothing_is_dropped_or_doubled(lengths, context, seed):
    plan = plan_packing(np.array(lengths), context, seeded(seed))
    seen = [np.zeros(n, int) for n in lengths]
    for index in range(len(plan)):
        row = plan.row(index)
        assert 0 < sum(stop - start for _, start, stop in row) <= context
        for example, start, stop in row:
            assert start % context == 0 and 0 < stop - start <= context
            seen[example][start:stop] += 1
    assert all((count == 1).all() for count in seen)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 80))
def test_a_block_is_packed_as_plain_best_fit_does_it(sizes, context):
    rows, count = pack_block(np.array(sizes), context)
    free_spaces: list[int] = []
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [(free_space, row) for row, free_space in enumerate(free_spaces) if free_space >= sizes[piece]]
        row = min(fits)[1] if fits else len(free_spaces)
        free_spaces = free_spaces if fits else [*free_spaces, context]
        free_spaces[row] -= sizes[piece]
        assert rows[piece] == row
    assert count == len(free_spaces)


@pytest.mark.parametrize("mean", [60, 500, 4000])
def test_rows_are_nearly_full(mean):
    lengths = np.maximum(1, seeded().lognormal(np.log(mean), 1, 20000)).astype(int)
    plan = plan_packing(lengths, 14336, seeded())
    assert lengths.sum() / (len(plan) * 14336) > 0.99


def test_the_order_is_that_of_the_seed():
    lengths = seeded().integers(1, 50, 500)
    one, again, other = (plan_packing(lengths, 64, seeded(seed)) for seed in (1, 1, 2))
    assert (one.example == again.example).all() and (one.begin == again.begin).all()
    assert [one.row(i) for i in range(20)] != [other.row(i) for i in range(20)]


def test_pieces_of_a_row_and_rows_are_in_random_order():
    """Best fit takes the longest first; what it made is not to be seen in the order."""
    lengths = seeded().integers(1, 64, 4000)
    plan = plan_packing(lengths, 256, seeded())
    first = np.array([lengths[plan.row(i)[0][0]] for i in range(len(plan))])
    sizes = np.array([len(plan.row(i)) for i in range(len(plan))])
    place = np.arange(len(plan))
    assert abs(np.corrcoef(place, sizes)[0, 1]) < 0.15 and abs(np.corrcoef(place, first)[0, 1]) < 0.15
    assert first.mean() < 45  # the longest first would be near 60

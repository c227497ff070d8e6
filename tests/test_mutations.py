"""The mutations fit the code: `python -m tests.mutations` runs them."""

from tests.mutations import MUTATIONS, problems


def test_every_mutation_fits_the_code():
    assert problems(MUTATIONS) == []
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)

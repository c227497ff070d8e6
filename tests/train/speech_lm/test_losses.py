"""The chunked loss equals the plain one, without materialising the logits of all rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.train.speech_lm.losses import CHUNK_ROWS, channel_sums, mean_or_zero, next_row_targets, token_nll


def plain(x, kernel, labels):
    logits = jax.nn.log_softmax((x @ kernel).astype(jnp.float32))
    return -jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk_rows", [1, 5, 8, 100])
def test_values_and_gradients_are_those_of_the_plain_loss(chunk_rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 16)).astype(np.float32)
    kernel = rng.normal(size=(16, 40)).astype(np.float32)
    labels = rng.integers(0, 40, (3, 8))
    weights = rng.random((3, 8)).astype(np.float32)

    def total(nll):
        return jax.value_and_grad(lambda x, kernel: (weights * nll(x, kernel)).sum(), (0, 1))(x, kernel)

    ours = total(lambda x, kernel: token_nll(x, kernel, labels, chunk_rows, 0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        ours,
        total(lambda x, kernel: plain(x, kernel, labels)),
    )


def arrays_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from arrays_in(inner)


def test_no_array_has_all_rows_and_the_whole_vocabulary():
    length = 14336
    width = 4096
    vocab = 151680
    shapes = [(2, length, width), (width, vocab), (2, length)]
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, ("bfloat16", "bfloat16", "int32"), strict=True)]

    def total(nll):
        return jax.make_jaxpr(jax.grad(lambda x, kernel, labels: nll(x, kernel, labels).sum(), (0, 1)))(*arguments)

    largest = max(aval.size for aval in arrays_in(total(token_nll).jaxpr))
    assert largest == width * vocab and width * vocab > CHUNK_ROWS * vocab  # the gradient of the head
    assert max(aval.size for aval in arrays_in(total(plain).jaxpr)) >= 2 * length * vocab  # the plain loss has them


def test_weights_belong_to_the_target_and_the_last_row_predicts_nothing():
    grid = jnp.arange(2 * 5 * 2).reshape(2, 5, 2)
    weights = jnp.arange(20.0).reshape(2, 5, 2)
    rows = next_row_targets({"grid": grid, "loss_weights": weights})
    np.testing.assert_array_equal(rows["labels"][:, :-1], grid[:, 1:])
    np.testing.assert_array_equal(rows["weights"][:, :-1], weights[:, 1:])
    assert not rows["weights"][:, -1].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_sums_by_source_add_up_and_rows_that_do_not_count_may_be_anything(seed):
    rng = np.random.default_rng(seed)
    nll = rng.random((3, 7))
    weights = rng.integers(0, 3, (3, 7)) / 2
    source = np.where(weights > 0, rng.integers(0, 4, (3, 7)), -1)
    nll = np.where(weights > 0, nll, np.nan)
    total, sums, counts = channel_sums(*(jnp.asarray(x, jnp.float32) for x in (nll, weights)), jnp.asarray(source), 4)
    np.testing.assert_allclose(total, np.nansum(nll * weights), rtol=1e-5)
    for i in range(4):
        np.testing.assert_allclose(sums[i], np.nansum((nll * weights)[source == i]), rtol=1e-5)
        np.testing.assert_allclose(counts[i], weights[source == i].sum(), rtol=1e-5)
    assert mean_or_zero(total, 0.0) == 0

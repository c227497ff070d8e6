"""Causal convolution: a stream of pieces gives the result of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.nn.conv import CausalConv1d, tail_after


@pytest.mark.parametrize("stride", [1, 2])
def test_pieces_with_tails_give_the_whole(stride):
    conv = CausalConv1d(features=3, width=4, stride=stride)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 5)), jnp.float32)
    params = conv.init(jax.random.key(0), x)
    whole = conv.apply(params, x)
    tail = jnp.zeros((2, 3, 5))
    pieces = []
    for piece in jnp.split(x, [2, 8], 1):
        pieces.append(conv.apply(params, piece, tail))
        tail = tail_after(piece, tail, piece.shape[1])
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=1e-6)


def test_the_tail_after_a_part_of_the_rows():
    x = jnp.arange(1.0, 6.0)[None, :, None]
    tail = jnp.array([[[-1.0], [0.0]]])
    for length, expected in ((0, [-1, 0]), (1, [0, 1]), (4, [3, 4])):
        np.testing.assert_array_equal(tail_after(x, tail, length)[0, :, 0], expected)

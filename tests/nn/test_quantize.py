"""Vector quantisation. The update of the codebook is tested with the training of the speech tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.nn.quantize import nearest_codes, straight_through, unit


def test_nearest_codes_have_the_smallest_distance():
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(17, 5)).astype(np.float32)
    vectors = rng.normal(size=(2, 9, 5)).astype(np.float32)
    distances = np.square(vectors[:, :, None] - codebook).sum(-1)
    codes = nearest_codes(jnp.asarray(vectors), jnp.asarray(codebook))
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, distances.argmin(-1))


def test_the_first_of_equal_codes_is_chosen():
    codebook = jnp.ones((4, 3))
    np.testing.assert_array_equal(nearest_codes(jnp.ones((1, 2, 3)), codebook), [[0, 0]])


def test_straight_through_has_the_quantised_value_and_the_gradient_of_the_vectors():
    vectors = jnp.array([0.3, -0.4])
    quantized = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(straight_through(vectors, quantized), quantized)
    gradient = jax.grad(lambda x: (straight_through(x, quantized) ** 2).sum())(vectors)
    np.testing.assert_allclose(gradient, 2 * quantized)


def test_unit_keeps_zero_vectors():
    np.testing.assert_allclose(unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])

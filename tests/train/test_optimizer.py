"""Schedules, clipping and what a wrong config says."""

import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.errors import MossError
from moss_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer, updates_made


def rates(**settings):
    config = OptimizerConfig(learning_rate=1.0, total_steps=100, **settings)
    return [round(float(learning_rate(config)(step)), 6) for step in range(101)]


def test_schedules():
    cosine = rates(warmup_steps=10, final_learning_rate=0.1)
    assert cosine[0] == 0.1 and cosine[4] == 0.5 and cosine[9] == cosine[10] == 1.0
    assert cosine[55] == 0.55 and cosine[100] == 0.1 and sorted(cosine[10:], reverse=True) == cosine[10:]
    wsd = rates(schedule="wsd", warmup_steps=10, decay_steps=20, final_learning_rate=0.5)
    assert wsd[10:81] == [1.0] * 71 and wsd[90] == 0.75 and wsd[100] == 0.5
    assert rates(schedule="constant") == [1.0] * 101
    assert rates(schedule="constant", warmup_steps=1)[0] == 1.0


def test_clipping_bounds_the_gradient_of_adam():
    params = {"a": jnp.zeros(4)}
    grads = {"a": jnp.full(4, 100.0)}
    seen = {}
    for clip in (None, 1.0):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip, schedule="constant"))
        _, state = optimizer.update(grads, optimizer.init(params), params)
        seen[clip] = float(jnp.linalg.norm(state[1].mu["a"]))
        assert int(updates_made(state)) == 1
    np.testing.assert_allclose([seen[None], seen[1.0]], [200 * 0.1, 0.1], rtol=1e-5)


MATRICES = {
    "shared/layers/attention/q/kernel": ((2, 24, 3, 8), (24, 24)),
    "shared/layers/attention/o/kernel": ((2, 3, 8, 24), (24, 24)),
    "text/layers/mlp/up/kernel": ((2, 24, 40), (24, 40)),
    "head/decoder_layers/cross_k/kernel": ((2, 24, 2, 8), (24, 16)),
}
OTHERS = {
    "text/embed/embedding": (50, 24),
    "text/head/kernel": (24, 50),
    "shared/layers/mlp_norm/scale": (2, 24),
    "encoder/conv1/kernel": (3, 8, 24),
    "encoder/layers/q/bias": (2, 3, 8),
    "decoder/layers/conv/kernel": (2, 3, 8, 8),
}


def update_of(params, **settings):
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1.0, schedule="constant", clip_norm=None, weight_decay=0.0, **settings)
    )
    draw = np.random.default_rng(1)
    grads = {path: jnp.asarray(draw.normal(size=x.shape), jnp.float32) for path, x in params.items()}
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    assert int(updates_made(state)) == 1
    return updates


def test_muon_makes_the_layers_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    shapes = {path: shape for path, (shape, _) in MATRICES.items()} | OTHERS
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    updates = update_of(params, method="muon")
    for path, (_, matrix) in MATRICES.items():
        for layer in np.asarray(updates[path]):
            values = np.linalg.svd(layer.reshape(matrix), compute_uv=False)
            # Newton's and Schulz' steps bring singular values near each other, all but the very small; of those of a
            # random square matrix a tenth are below a tenth of the largest.
            assert values.max() < 2 * np.quantile(values, 0.1), path
            # As large as AdamW's of many steps: 0.2 an entry.
            np.testing.assert_allclose(values.mean() / max(matrix) ** 0.5, 0.2, rtol=0.3)
    for path in OTHERS:
        sizes = np.abs(updates[path])  # Adam's first step is the gradient's sign, all of one size
        np.testing.assert_allclose(sizes, sizes.max(), rtol=1e-3)


def test_muon_does_not_depend_on_the_number_of_heads():
    draw = np.random.default_rng(0)
    params = {"layers/q/kernel": jnp.asarray(draw.normal(size=(1, 24, 3, 8)))}
    cut = {"layers/q/kernel": params["layers/q/kernel"].reshape(1, 24, 6, 4)}
    one, two = (update_of(p, method="muon")["layers/q/kernel"] for p in (params, cut))
    np.testing.assert_allclose(one.reshape(two.shape), two, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"method": "sgd"}, "method is 'sgd', expected one of adamw, muon"),
        ({"schedule": "linear"}, "schedule is 'linear', expected one of cosine, wsd, constant"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected above 0"),
        ({"warmup_steps": 90, "decay_steps": 20, "total_steps": 100}, "are more than total_steps 100"),
        ({"schedule": "wsd"}, "'wsd' needs decay_steps"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
    ],
)
def test_bad_configs_are_refused(settings, problem):
    with pytest.raises(MossError, match=problem):
        OptimizerConfig(**settings)

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


def test_clipping_bounds_the_gradient_that_adam_sees():
    params, grads = {"a": jnp.zeros(4)}, {"a": jnp.full(4, 100.0)}
    seen = {}
    for clip in (None, 1.0):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip, schedule="constant"))
        _, state = optimizer.update(grads, optimizer.init(params), params)
        seen[clip] = float(jnp.linalg.norm(state[1].mu["a"]))
        assert int(updates_made(state)) == 1
    np.testing.assert_allclose([seen[None], seen[1.0]], [200 * 0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"schedule": "linear"}, "schedule is 'linear', expected one of cosine, wsd, constant"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected above 0"),
        ({"warmup_steps": 90, "decay_steps": 20, "total_steps": 100}, "are more than total_steps 100"),
        ({"schedule": "wsd"}, "'wsd' needs decay_steps"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
    ],
)
def test_what_a_config_refuses(settings, problem):
    with pytest.raises(MossError, match=problem):
        OptimizerConfig(**settings)

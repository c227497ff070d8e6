"""The flow's loss: against a few lines of numpy, against the stream, its random choices, and that it teaches."""

from dataclasses import replace
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moss_jax.errors import MossError
from moss_jax.nn import attention
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.speech_decoder.flow.config import TINY
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.flow.noise import noise
from moss_jax.speech_decoder.flow.stream import CachedFlow
from moss_jax.train.speech_decoder.flow import FlowObjective, centred, draw, squared_error, velocity
from tests.speech_decoder.test_flow import tiny_params

CODES = 12
CONFIG = replace(TINY, mel_mean=-5.0, mel_std=2.5)


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return {
        "codes": random.integers(0, CONFIG.codebook_size, (3, CODES)).astype(np.int32),
        "count": np.array([12, 7, 10], np.int32),
        "mel": random.normal(-5, 3, (3, 4 * CODES, CONFIG.mel_bins)).astype(np.float32),
        "embedding": random.normal(size=(3, CONFIG.speaker_size)).astype(np.float32),
    }


def test_the_distributions_of_random_draws():
    objective = FlowObjective()
    count = jnp.full(4000, 50)
    drawn = jax.jit(lambda key: draw(key, objective, CONFIG, count, 64))(jax.random.key(0))
    assert abs(float(drawn["keep"].mean()) - 0.8) < 0.03
    prompted = np.asarray(drawn["prompt"]) > 0
    assert abs(prompted.mean() - 0.5 * 60 / 61) < 0.03 and drawn["prompt"].max() == 60  # of 200 frames
    quantiles = 1 - np.cos(np.pi / 2 * np.array([0.1, 0.5, 0.9]))
    np.testing.assert_allclose(np.quantile(drawn["t"], [0.1, 0.5, 0.9]), quantiles, atol=0.03)
    assert set(np.unique(drawn["chunk"])) == {5, 25, 64}
    assert abs(float(drawn["noise"].mean())) < 0.01 and abs(float(drawn["noise"].std()) - 1) < 0.01
    other = draw(jax.random.key(1), objective, CONFIG, count, 64)
    assert not np.array_equal(drawn["t"], other["t"]) and not np.array_equal(drawn["noise"], other["noise"])


@pytest.mark.slow
def test_the_loss_is_the_formula(params, batch):
    """One item at a time, unpadded; the first one has lost its conditions, the second has a prompt and a chunk mask."""
    sigma = 0.01
    two = {name: value[:2] for name, value in batch.items()}
    drawn = {
        "t": np.array([0.2, 0.7], np.float32),
        "noise": np.random.default_rng(1).normal(size=two["mel"].shape).astype(np.float32),
        "keep": np.array([False, True]),
        "prompt": np.array([0, 9]),
        "chunk": np.array([12, 5]),
    }
    predicted, target, _, valid = jax.jit(lambda p: velocity(p, CONFIG, two, drawn, sigma))(params)
    loss = squared_error(predicted, target, valid).sum() / valid.sum()
    model = FlowModel(CONFIG)
    total = 0.0

    def apply(*inputs, method):
        return model.apply({"params": params}, *inputs, method=method)

    def estimated(codes, y, prompt, embedding, t, chunk):
        count = codes.shape[1] - CONFIG.lookahead
        frames = y.shape[1]
        x = apply(codes, np.array([count]), method="embed")
        mu, _ = apply(x, np.ones((1, count), bool), chunk, method="encode")
        speaker = apply(embedding, method="speaker_projection")
        time = apply(t, method="time_embedding")
        if chunk is None:
            mu = 0 * mu
            speaker = 0 * speaker
            prompt = 0 * prompt
        valid = np.ones((1, frames), bool)
        return apply(y, mu, speaker, prompt, time, valid, chunk and 4 * chunk, method="velocity")[0]

    for i, (count, chunk) in enumerate(((12, None), (7, 5))):
        mel = ((two["mel"][i] + 5) / 2.5)[: 4 * count]
        z = drawn["noise"][i, : 4 * count]
        t = drawn["t"][i : i + 1]
        y = (1 - (1 - sigma) * t[:, None]) * z + t[:, None] * mel
        codes = np.pad(two["codes"][i, :count], (0, CONFIG.lookahead))[None]
        prompt = np.where(np.arange(4 * count)[:, None] < drawn["prompt"][i], mel, 0).astype(np.float32)
        v = jax.jit(estimated, static_argnums=5)(codes, y[None], prompt[None], two["embedding"][i : i + 1], t, chunk)
        total += np.square(np.asarray(v[0]) - (mel - (1 - sigma) * z)).sum()
    np.testing.assert_allclose(loss, total / (4 * two["count"].sum() * CONFIG.mel_bins), rtol=2e-5)


@pytest.mark.slow
def test_the_forward_pass_of_training_equals_a_stream(params, batch):
    """With one Euler step and no guidance a stream says noise + velocity at t = 0, restored."""
    config = replace(CONFIG, euler_steps=1, guidance=0.0)
    buffer = np.array(noise(config.noise_frames, config.mel_bins))[:, : 4 * CODES]
    drawn = {
        "t": jnp.zeros(1),
        "noise": buffer,
        "keep": jnp.array([True]),
        "prompt": jnp.array([0]),
        "chunk": jnp.array([config.chunk]),
    }
    one = {name: value[:1] for name, value in batch.items()}
    predicted, *_ = jax.jit(lambda p: velocity(p, config, one, drawn, 0.0))(params)
    expected = np.asarray(buffer + predicted) * 2.5 - 5

    flow = CachedFlow(params, config)
    voice = SimpleNamespace(
        codes=np.zeros(0, np.int32), mel=np.zeros((0, config.mel_bins), np.float32), embedding=batch["embedding"][0]
    )
    stream = flow.stream(flow.prefill(voice))
    parts = [stream.push(batch["codes"][0, :9]), stream.push(batch["codes"][0, 9:]), stream.finish()]
    assert parts[0].shape[1] == 20 and parts[2].shape[1] > 0
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=2e-5 * np.abs(expected).max())


def test_chunks_of_each_item():
    valid = jnp.arange(11)[None] < jnp.array([[11], [9], [11]])
    each = attention.chunk_mask(11, valid, jnp.array([3, 4, 11]))
    np.testing.assert_array_equal(each[0], attention.chunk_mask(11, valid[:1], 3)[0])
    np.testing.assert_array_equal(each[1], attention.chunk_mask(11, valid[1:2], 4)[0])
    np.testing.assert_array_equal(each[2], attention.chunk_mask(11, valid[2:], None)[0])


@pytest.mark.slow
def test_the_start_is_centred_and_steps_teach(batch):
    """What explodes from scratch is a flow whose mel lies at -6 while the weights say 0: here the first loss is the
    spread of the mel and the noise, whatever the mean is, and the gradient that much smaller."""
    config = TINY
    objective = FlowObjective(chunks=(0, 5))
    raw = flatten(nn.unbox(jax.jit(FlowModel(config).init)(jax.random.key(0)))["params"])
    table = np.random.default_rng(2).normal(-7, 2, (config.codebook_size, config.mel_bins))
    far = batch | {"mel": np.repeat(table[batch["codes"]], 4, 1).astype(np.float32)}
    mean = far["mel"].mean((0, 1))
    drawn = draw(jax.random.key(1), objective, config, far["count"], CODES)

    def loss(flat):
        predicted, target, _, valid = velocity(unflatten(flat), config, far, drawn, objective.sigma)
        return squared_error(predicted, target, valid).sum() / valid.sum()

    gradient = jax.jit(jax.value_and_grad(loss))
    params = centred(raw, config, mean)
    (first, grads) = gradient(params)
    (before, raw_grads) = gradient(raw)
    valid = (np.arange(4 * CODES) < 4 * far["count"][:, None])[..., None]
    spread = np.square(far["mel"] - drawn["noise"] - mean[None, None])[np.broadcast_to(valid, far["mel"].shape)].mean()
    np.testing.assert_allclose(first, spread, rtol=1e-4)
    assert before > 3 * first
    assert optax.tree.norm(raw_grads) > 3 * optax.tree.norm(grads)

    update = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    state = update.init(params)
    step = jax.jit(lambda grads, state, params: update.update(grads, state, params))
    for _ in range(20):
        value, grads = gradient(params)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert float(value) < 0.9 * float(first)


@pytest.mark.slow
def test_bfloat16_agrees_up_to_rounding(params, batch):
    drawn = draw(jax.random.key(1), FlowObjective(), CONFIG, batch["count"], CODES)

    def loss(params, dtype):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        predicted, target, _, valid = velocity(params, CONFIG, batch, drawn, 1e-6, dtype)
        return squared_error(predicted, target, valid).sum() / valid.sum()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (high, _) = gradient(params, jnp.float32)
    (low, grads) = gradient(params, jnp.bfloat16)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(low, high, rtol=0.05)


def test_bad_objectives_are_refused():
    with pytest.raises(MossError, match=r"drop is 1\.0"):
        FlowObjective(drop=1.0)
    with pytest.raises(MossError, match="chunks are"):
        FlowObjective(chunks=())

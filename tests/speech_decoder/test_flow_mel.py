"""An estimator that predicts the mel, without guidance, as in the flow of nano."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from moss_jax.nn.tree import flatten, unflatten
from moss_jax.speech_decoder.flow import sampler
from moss_jax.speech_decoder.flow.config import TINY
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.flow.noise import noise
from moss_jax.speech_decoder.flow.stream import CachedFlow
from moss_jax.train.speech_decoder.flow import LAST_BIAS, LAST_KERNEL, centred
from tests.speech_decoder.test_flow import make_codes, make_voice, tiny_params

CONFIG = replace(TINY, predicts="mel", guidance=0.0)
CODES = 20


def states(params, config=CONFIG, streaming=False):
    codes = make_codes(config, CODES)
    prompt = np.zeros((1, 4 * CODES, config.mel_bins), np.float32)
    z = noise(config.noise_frames, config.mel_bins)
    voice = make_voice(config, 0)
    inputs = z, codes[None], np.array([CODES]), prompt, voice.embedding[None]
    return np.asarray(jax.jit(lambda p: sampler.flow(p, config, *inputs, streaming))(params))


def test_a_zero_prediction_gives_the_encoders_mel():
    mean = np.linspace(-8, -4, CONFIG.mel_bins)
    flat = centred(flatten(tiny_params(CONFIG)), CONFIG, mean) | {LAST_BIAS: np.zeros(CONFIG.mel_bins, np.float32)}
    np.testing.assert_allclose(flat["mu/bias"], CONFIG.normalized(mean), rtol=1e-6)
    assert not np.asarray(flat[LAST_KERNEL]).any()
    params = unflatten(flat)
    model = FlowModel(CONFIG)
    codes = make_codes(CONFIG, CODES)

    def encoded(params):
        ahead = np.zeros(CONFIG.lookahead, np.int32)
        x = model.apply({"params": params}, np.append(codes, ahead)[None], np.array([CODES]), method="embed")
        return model.apply({"params": params}, x, np.ones((1, CODES), bool), method="encode")[0]

    found = states(params)
    mu = np.asarray(jax.jit(encoded)(params))
    np.testing.assert_allclose(found[-1], mu, atol=1e-5)
    # Every state before it is on the line from noise to it.
    t = sampler.times(CONFIG)[:, None, None, None]
    np.testing.assert_allclose(found, (1 - t) * found[0] + t * mu, atol=1e-4)


@pytest.mark.slow
def test_a_stream_without_guidance_is_the_masked_run():
    params = tiny_params(CONFIG)
    whole = states(params, streaming=True)[-1]
    assert np.abs(whole - states(params, replace(CONFIG, predicts="velocity"), True)[-1]).max() > 0.01
    flow = CachedFlow(params, CONFIG)
    prompt = flow.prefill(make_voice(CONFIG, 0))
    assert prompt.state.cache.k.shape[2] == CONFIG.rows == 1
    request = flow.stream(prompt)
    parts = [request.push(make_codes(CONFIG, CODES)[:7]), request.push(make_codes(CONFIG, CODES)[7:]), request.finish()]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4)

"""What the trainings minimise, on a few numbers: the direction of the flow, and every weight of the losses.

These are analytic and take seconds; what the trainings make of them is tested by the longer tests of each part.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.nn.tree import flatten
from moss_jax.speech_decoder.flow.config import TINY
from moss_jax.speech_tokenizer.encoder import init_params
from moss_jax.train.speech_decoder.flow import velocity
from moss_jax.train.speech_tokenizer.head import init_head
from moss_jax.train.speech_tokenizer.run import Objective
from moss_jax.train.speech_tokenizer.step import CODEBOOK, Recogniser, loss_of
from tests.speech_decoder.test_flow import tiny_params
from tests.train import tones

CODES = 2
SIGMA = 0.1


@pytest.mark.parametrize("predicts", ["velocity", "mel"])
def test_the_flow_leads_from_noise_to_the_mel(predicts):
    """One Euler step of the target velocity from time t ends at the mel: at the noise level sigma for "velocity",
    exactly for "mel"."""
    config = replace(TINY, mel_mean=-5.0, mel_std=2.5, predicts=predicts)
    random = np.random.default_rng(0)
    shape = (2, CODES * config.frames_per_code, config.mel_bins)
    batch = {
        "codes": np.array([[3, 7], [5, 2]], np.int32),
        "count": np.full(2, CODES, np.int32),
        "mel": random.normal(-5, 3, shape).astype(np.float32),
        "embedding": random.normal(size=(2, config.speaker_size)).astype(np.float32),
    }
    noise = random.normal(size=shape).astype(np.float32)
    t = np.array([0.25, 0.75], np.float32)
    drawn = {
        "t": t,
        "noise": noise,
        "keep": np.array([True, True]),
        "prompt": np.zeros(2, np.int32),
        "chunk": np.full(2, CODES),
    }
    params = tiny_params(config)
    _, target, _, valid = jax.jit(lambda drawn: velocity(params, config, batch, drawn, SIGMA))(drawn)
    mel = (batch["mel"] + 5) / 2.5
    left = (1 - t)[:, None, None]
    state = (1 - (1 - SIGMA) * t[:, None, None]) * noise + t[:, None, None] * mel
    end = mel + SIGMA * noise if predicts == "velocity" else mel
    np.testing.assert_allclose(state + left * np.asarray(target), end, atol=1e-5)
    assert valid.all()


def test_every_loss_of_the_speech_tokenizer_has_its_weight():
    sums = {"asr": (6.0, 2.0), "mel": (10.0, 5.0), "commitment": (8.0, 2.0)}
    objective = Objective(asr_weight=1.0, mel_weight=0.5, commitment_weight=0.25, commitment_from=10)
    loss, parts = loss_of(sums, objective, jnp.int32(10))
    assert float(loss) == 3.0 + 0.5 * 2.0 + 0.25 * 4.0
    assert parts == {"asr_loss": 3.0, "mel_loss": 2.0, "commitment_loss": 4.0}
    assert float(loss_of(sums, objective, jnp.int32(9))[0]) == 4.0
    default = Objective()
    loss, _ = loss_of(sums, default, jnp.int32(default.commitment_from))
    assert float(loss) == 3.0 + 2.0 + 0.25 * 4.0


@pytest.mark.slow
def test_commitment_draws_the_vectors_to_their_codes():
    config = replace(tones.MODEL, normalize_codes=False)
    objective = Objective(layers=1, mel_hidden=8)
    recogniser = Recogniser(config, objective, units=5)
    keys = jax.random.split(jax.random.key(0))
    params = flatten({"encoder": init_params(config, keys[0]), "head": init_head(recogniser.head, keys[1])})
    codebook = params.pop(CODEBOOK)
    samples = np.array([4, 2], np.int32) * config.samples_per_code
    batch = {
        "wave": np.random.default_rng(0).normal(0, 0.1, (2, samples[0])).astype(np.float32),
        "samples": samples,
        "labels": np.ones((2, 1), np.int32),
        "label_count": np.ones(2, np.int32),
        "weight": np.array([1.0, 0.0], np.float32),  # the second clip does not count
    }
    found = jax.jit(recogniser.sums)(params, codebook, batch)
    distance = np.square(np.asarray(found["vectors"]) - np.asarray(codebook)[np.asarray(found["codes"])]).mean(-1)
    total, count = found["commitment"]
    assert float(count) == 4.0 and float(total) > 0
    np.testing.assert_allclose(total, distance[0].sum(), rtol=1e-5)

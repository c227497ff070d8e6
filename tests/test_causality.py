"""Causality: the gradient of an output position with respect to later inputs is exactly 0.

Every output position is projected on a random direction, and the Jacobian of the projections is compared with the
documented receptive field of the model.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.nn.tree import unflatten
from moss_jax.speech_decoder.flow.config import TINY as FLOW
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.vocoder.config import TINY as VOCODER
from moss_jax.speech_decoder.vocoder.model import HiFT
from moss_jax.speech_lm import TINY, LayerSplitModel
from moss_jax.speech_tokenizer.config import TINY as ENCODER
from moss_jax.speech_tokenizer.encoder import Encoder, init_params
from tests.speech_decoder.test_flow import tiny_params
from tests.speech_decoder.test_vocoder import random_params as vocoder_params
from tests.speech_lm.test_model import random_params


def influence(function, *inputs):
    """For every input [output positions, input positions]: the largest gradient of a random projection of each output
    position.

    Args:
        function: of the inputs [1, T, D] -> [1, T', D'].
    """

    def projected(*inputs):
        y = function(*inputs)[0].astype(jnp.float32)
        return (y * jax.random.normal(jax.random.key(1), y.shape)).sum(-1)

    jacobians = jax.jit(jax.jacrev(projected, argnums=tuple(range(len(inputs)))))(*inputs)
    return [np.abs(jacobian[:, 0]).max(-1) for jacobian in jacobians]


def check(found, reach):
    """Output i depends on inputs up to reach[i] - 1, including that one, and on no later ones."""
    for row, end in zip(found, reach, strict=True):
        assert (row[end:] == 0).all()
        assert row[:end].any() and row[end - 1] > 0


@pytest.mark.parametrize("branch", ["text", "audio"])
def test_language_model(branch):
    model = LayerSplitModel(TINY)
    params = random_params(TINY)
    length = 7
    positions = jnp.arange(length)[None]

    def logits(x):
        def call(*inputs, method):
            return model.apply({"params": params}, *inputs, method=method)

        h = call("shared", x, positions, method="block")
        return call(branch, call(branch, h, positions, method="block"), method="logits")

    x = jax.random.normal(jax.random.key(0), (1, length, TINY.hidden_size))
    (found,) = influence(logits, x)
    check(found, range(1, length + 1))
    assert (np.tril(found) > 0).sum() == length * (length + 1) / 2


def test_speech_tokenizer_encoder():
    params = jax.jit(lambda: init_params(ENCODER, jax.random.key(0)))()
    size = ENCODER.frames_per_code
    codes = 4
    frames = jax.random.normal(jax.random.key(0), (1, codes * size, ENCODER.num_mel_bins))
    (found,) = influence(lambda x: Encoder(ENCODER).apply({"params": params}, x, method="vectors")[0], frames)
    # The second convolution has stride 2: the last frame of a code only reaches the following codes.
    check(found, [size * (code + 1) - 1 for code in range(codes)])


def flow_functions(chunk, codes):
    """Encoder and estimator under a chunk mask, as functions of the embedded codes and of the state."""
    params = tiny_params(FLOW)
    frames = codes * FLOW.frames_per_code
    keys = jax.random.split(jax.random.key(2), 4)
    speaker = jax.random.normal(keys[0], (1, FLOW.mel_bins))
    prompt = jnp.zeros((1, frames, FLOW.mel_bins))
    state = jax.random.normal(keys[1], (1, frames, FLOW.mel_bins))
    embedded = jax.random.normal(keys[2], (1, codes + FLOW.lookahead, FLOW.encoder.hidden_size))

    def call(*inputs, method):
        return FlowModel(FLOW).apply({"params": params}, *inputs, method=method)

    def run(x, y):
        mu, _ = call(x, jnp.ones((1, codes), bool), chunk, method="encode")
        time = call(jnp.array([0.4]), method="time_embedding")
        valid = jnp.ones((1, frames), bool)
        mask = None if chunk is None else chunk * FLOW.frames_per_code
        return call(y, mu, speaker, prompt, time, valid, mask, method="velocity")[0]

    return run, embedded, state


@pytest.mark.slow
def test_flow_in_streaming_mode():
    """A frame depends on its own and earlier chunks, and on the look-ahead codes after its chunk."""
    codes = 8
    size = FLOW.frames_per_code
    run, embedded, state = flow_functions(FLOW.chunk, codes)
    ends = [min((code // FLOW.chunk + 1) * FLOW.chunk, codes) for code in range(codes)]
    of_codes, of_state = influence(run, embedded, state)
    check(of_codes, np.repeat([end + FLOW.lookahead for end in ends], size))
    check(of_state, np.repeat(ends, size) * size)
    whole, *_ = flow_functions(None, codes)
    first_frame = jax.jit(jax.grad(lambda x: whole(x, state)[0, 0].sum()))(embedded)
    assert np.abs(first_frame[0, -1]).max() > 0, "offline, the first frame depends on the last code"


def test_f0_of_the_vocoder():
    """The vocoder is not causal, but its F0 depends on only `f0_reach` frames on each side: streaming needs that."""
    tree = jax.tree.map(jnp.asarray, unflatten(vocoder_params(VOCODER)))
    mel = jax.random.normal(jax.random.key(0), (1, 14, VOCODER.mel_bins))
    (found,) = influence(lambda x: HiFT(VOCODER).apply({"params": tree}, x, method="f0")[..., None], mel)
    reach = VOCODER.f0_reach
    for frame, row in enumerate(found):
        assert (row[frame + reach + 1 :] == 0).all() and (row[: max(frame - reach, 0)] == 0).all()
        assert row[frame : frame + reach + 1].any()

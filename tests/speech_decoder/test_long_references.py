"""The codes-to-speech parts against the PyTorch reference at several hundred frames, where an error of positions shows.

`tests/data/long_speech_decoder.safetensors` holds slices of the reference's outputs. They were made once like this, on
the CPU in float32 with torch 2.13: the classes `CausalMaskedDiffWithXvec`, `CausalConditionalCFM`,
`CausalConditionalDecoder` and `HiFTGenerator` of OpenMOSS/MOSS-Speech `cosyvoice/` (commit 6b86ef6) were built with the
sizes of `FLOW` and `VOCODER` below (the look-ahead and up layers, which hard-code 512 channels, with the encoder's
width), given `draw_weights(shapes of their own state_dict, seed)` by name, and run on the inputs that the functions
below draw: `inference` for the flow, `inference` with the given sine noise in place of `torch.randn_like`, and
`f0_predictor`, for the vocoder. CAM++ is a transcription of 3D-Speaker's CAMPPlus in torch functions, with its names.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from moss_jax.convert.tables import flow as flow_table
from moss_jax.convert.tables import speaker as speaker_table
from moss_jax.convert.tables import vocoder as vocoder_table
from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.speech_decoder import vocoder
from moss_jax.speech_decoder.flow import config as flow_sizes
from moss_jax.speech_decoder.flow import sampler, stream
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.speaker import CAMPPlus, SpeakerConfig
from moss_jax.speech_decoder.vocoder import config as vocoder_config
from moss_jax.speech_decoder.voice import Voice
from tests.reference_weights import draw_weights

FLOW = flow_sizes.FlowConfig(
    vocab_size=160,
    codebook_size=160,
    chunk=5,
    encoder=flow_sizes.EncoderConfig(hidden_size=32, intermediate_size=48, num_heads=4, num_layers=2, num_up_layers=4),
    estimator=flow_sizes.EstimatorConfig(
        channels=24, intermediate_size=96, time_size=96, num_heads=2, head_dim=12, num_blocks=1, num_mid_stages=2
    ),
)
# the prompt is no multiple of the chunk; 468 mel frames in all
PROMPT = 13
CODES = 104
VOCODER = replace(vocoder_config.TINY, f0_layers=5)  # as the reference has it
FRAMES = 240
SPEAKER = SpeakerConfig(
    num_mel_bins=80,
    embedding_size=24,
    head_channels=4,
    head_blocks=(2, 2),
    init_channels=16,
    growth_rate=4,
    bottleneck=16,
    context_reduction=2,
    dense_layers=(3, 4, 2),
    dense_dilations=(1, 2, 2),
    segment_frames=100,
)
FBANK_FRAMES = 657  # 329 after the stride: three pooling segments and a part of one


@pytest.fixture(scope="module")
def stored():
    return load_file(Path(__file__).parents[1] / "data" / "long_speech_decoder.safetensors")


def flow_inputs():
    """(codes [N], prompt codes [P], prompt mel [4P, 80], embedding [192])."""
    random = np.random.default_rng(11)
    codes = random.integers(0, FLOW.codebook_size, PROMPT + CODES).astype(np.int32)
    mel = random.standard_normal((4 * PROMPT, 80)).astype(np.float32)
    return codes[PROMPT:], codes[:PROMPT], mel, random.standard_normal(192).astype(np.float32)


def vocoder_inputs():
    """(mel [1, T, 80], sine noise [1, 480T, 9], source [1, 480T])."""
    random = np.random.default_rng(21)
    mel = random.standard_normal((1, FRAMES, 80)).cumsum(1) / FRAMES**0.5
    noise = random.standard_normal((1, FRAMES * 480, 9))
    source = 0.1 * random.standard_normal((1, FRAMES * 480))
    return tuple(x.astype(np.float32) for x in (mel, noise, source))


def vocoder_weights(shapes):
    """An F0 of 50 to 300 Hz, and a wave that does not clip."""
    weights = draw_weights(shapes, 22)
    for name in weights:
        if name.endswith("original0") and not name.startswith("f0"):
            weights[name] = weights[name] * np.float32(0.6)
    weights["f0_predictor.classifier.weight"] *= np.float32(150)
    weights["f0_predictor.classifier.bias"] += np.float32(90)
    return weights


def speaker_inputs():
    return np.random.default_rng(31).standard_normal((1, FBANK_FRAMES, 80)).astype(np.float32) * 2


def flow_slices(mel):
    """What is stored of a mel [4N, 80]: every 13th frame, every 7th bin."""
    return mel[::13, ::7]


def wave_slices(wave):
    """What is stored of 480T samples: 64 out of every 7,200."""
    return wave.reshape(-1, 7200)[:, 1000:1064]


@pytest.fixture(scope="module")
def flow_params():
    tree = param_shapes(FlowModel(FLOW))
    table = flow_table.table(FLOW)
    return unflatten(table.to_ours(draw_weights(table.shapes(tree), 12), tree, "weights"))


@pytest.mark.parametrize(("streaming", "finalize"), [(False, True), (True, False)])
def test_flow(stored, flow_params, streaming, finalize):
    codes, prompt, mel, embedding = flow_inputs()
    ours = sampler.decode(
        flow_params, FLOW, codes, Voice(prompt, mel, embedding), streaming=streaming, finalize=finalize
    )
    expected = stored[f"mel_streaming{int(streaming)}_finalize{int(finalize)}"]
    assert ours.shape[1] == 4 * CODES - (0 if finalize else 12)
    np.testing.assert_allclose(flow_slices(ours[0]), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_cached_flow_gives_the_mel_of_the_reference_s_chunks(stored, flow_params):
    codes, prompt, mel, embedding = flow_inputs()
    cached = stream.CachedFlow(flow_params, FLOW)
    run = cached.stream(cached.prefill(Voice(prompt, mel, embedding)))
    parts = [np.asarray(run.push(part)) for part in np.split(codes, [1, 7, 50, 51, 90])]
    ours = np.concatenate([part.reshape(-1, 80) for part in parts])
    expected = stored["mel_streaming1_finalize0"]
    assert len(ours) > 380
    np.testing.assert_allclose(flow_slices(ours), expected[: -(-len(ours) // 13)], atol=1e-4, rtol=1e-5)


def test_vocoder(stored):
    mel, noise, source = vocoder_inputs()
    inputs = jax.ShapeDtypeStruct(mel.shape, jnp.float32), jax.ShapeDtypeStruct(noise.shape, jnp.float32)
    tree = param_shapes(vocoder.HiFT(VOCODER), *inputs)
    table = vocoder_table.table(VOCODER)
    params = table.to_ours(vocoder_weights(table.shapes(tree)), tree, "weights")
    params = unflatten(vocoder.fold_weight_norm(params))
    model = vocoder.HiFT(replace(VOCODER, weight_norm=False))

    @jax.jit
    def run(params):
        wave, made = model.apply({"params": params}, mel, noise)
        f0 = model.apply({"params": params}, mel, method="f0")
        given = model.apply({"params": params}, mel, source, method="decode")
        return f0[0], made[0], wave[0], given[0]

    f0, made, wave, given = map(np.asarray, run(params))
    np.testing.assert_allclose(f0, stored["f0"], atol=1e-3, rtol=1e-4)
    np.testing.assert_allclose(wave_slices(given), stored["wave_of_given_source"], atol=1e-5)
    np.testing.assert_allclose(wave_slices(made), stored["source"], atol=2e-3)  # float32 phases of the reference
    np.testing.assert_allclose(wave_slices(wave), stored["wave"], atol=3e-3)


def test_speaker(stored):
    features = speaker_inputs()
    tree = param_shapes(CAMPPlus(SPEAKER), jax.ShapeDtypeStruct(features.shape, jnp.float32))
    table = speaker_table.table(SPEAKER)
    params = unflatten(table.to_ours(draw_weights(table.shapes(tree), 32), tree, "weights"))
    ours = jax.jit(CAMPPlus(SPEAKER).apply)({"params": params}, features)
    np.testing.assert_allclose(ours[0], stored["embedding"], atol=1e-5, rtol=1e-4)

"""Codes -> speech, offline and as a stream."""

from dataclasses import replace
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dev.parity import check_golden, read_golden
from dev.reference.stream import reference_stream, seeded_noise
from moss_jax.checkpoint.config_io import read_config, write_config
from moss_jax.errors import MossError
from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.speech_decoder.config import RELEASED, TINY, SpeechDecoderConfig
from moss_jax.speech_decoder.decoder import SpeechDecoder
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.voice import Voice
from tests.compilations import compilations
from tests.speech_decoder.test_vocoder import random_params

CODES = np.random.default_rng(5).integers(0, TINY.flow.codebook_size, 40)


@pytest.fixture(scope="session")
def decoder():
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        fan_in = np.prod(leaf.shape[-3:-1], dtype=int) if path.endswith("kernel") else 1
        return (path.endswith("scale") + rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)

    shapes = param_shapes(FlowModel(TINY.flow))
    flow = unflatten({path: jnp.asarray(draw(path, leaf)) for path, leaf in shapes.items()})
    return SpeechDecoder(TINY, {"flow": flow, "flow_chunk_5": flow, "vocoder": unflatten(random_params(TINY.vocoder))})


def voice(prompt):
    rng = np.random.default_rng(prompt)
    codes = rng.integers(0, TINY.flow.codebook_size, prompt).astype(np.int32)
    mel = rng.normal(size=(4 * prompt, TINY.flow.mel_bins)).astype(np.float32)
    return Voice(codes, mel, rng.normal(size=TINY.flow.speaker_size).astype(np.float32))


ZERO = Voice.zero(TINY.flow.mel_bins, TINY.flow.speaker_size)


@pytest.fixture
def compiled():
    with compilations() as names:
        yield names


@pytest.mark.slow
def test_offline_decode(decoder, compiled):
    first = decoder.decode(CODES[:11], voice(7), seed=3)
    assert first.dtype == np.float32 and first.shape == (11 * 1920,)
    assert np.abs(first).max() > 0.01
    assert compiled
    compiled.clear()
    np.testing.assert_array_equal(decoder.decode(CODES[:11], voice(7), seed=3), first)
    assert np.abs(decoder.decode(CODES[:11], voice(7), seed=4) - first).max() > 1e-3
    assert decoder.decode(CODES[:12], voice(8), seed=3).shape == (12 * 1920,)  # the same buckets
    assert not compiled


def test_one_code_without_a_voice(decoder):
    assert decoder.decode(CODES[:1], ZERO).shape == (1920,)


@pytest.mark.parametrize("prompt, codes", [(7, 13), (3, 1)])
def test_the_reference_stream_emits_every_sample(decoder, prompt, codes):
    stream = reference_stream(decoder, voice(prompt))
    waves = [stream.push(part) for part in np.array_split(CODES[:codes], 3)] + [stream.finish()]
    assert sum(map(len, waves)) == 1920 * codes
    if codes == 1:  # too short for a first hop: an offline decode
        noise = seeded_noise(TINY, 0)(0, 4)
        assert np.isfinite(waves[-1]).all() and noise.shape == (1920, 9)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([0, 7, 10]), st.integers(1, 21), st.lists(st.integers(0, 9), max_size=6))
@example(7, 1, [])
@example(10, 13, [1] * 13)
@example(7, 8, [8])
def test_a_stream_does_not_depend_on_how_codes_are_divided(decoder, whole, prompt, count, sizes):
    stream = decoder.stream(voice(prompt), seed=2)
    waves = []
    codes = CODES[:count]
    for size in sizes:
        waves.append(stream.push(codes[:size]))
        codes = codes[size:]
    waves += [stream.push(codes), stream.finish()]
    ours = np.concatenate(waves)
    assert ours.dtype == np.float32 and ours.size == 1920 * count
    np.testing.assert_allclose(ours, whole(prompt, count), atol=1e-4)


@pytest.fixture(scope="module")
def whole(decoder):
    @lru_cache
    def run(prompt, count):
        stream = decoder.stream(voice(prompt), seed=2)
        return np.concatenate([stream.push(CODES[:count]), stream.finish()])

    return run


def test_a_stream_gives_its_samples_early_and_compiles_once(decoder, whole, compiled):
    whole(7, 12)  # compiles everything
    compiled.clear()
    stream = decoder.stream(voice(7), seed=2)
    early = [len(stream.push(CODES[i : i + 1])) // 480 for i in range(21)]
    # With 7 codes of prompt a chunk ends after 3, 8, 13 and 18 codes, is computed 3 codes later, and 8 frames are held.
    assert early == [0] * 5 + [4] + [0] * 4 + [20] + [0] * 4 + [20] + [0] * 4 + [20]
    assert len(stream.finish()) // 480 == 20
    assert not compiled


def bad(name):
    v = voice(3)
    return {
        "no codes": lambda d: d.decode(CODES[:0], ZERO),
        "code too large": lambda d: d.decode([1, 2, TINY.flow.codebook_size], ZERO),
        "negative code": lambda d: d.decode([-1], ZERO),
        "floats": lambda d: d.decode([0.5], ZERO),
        "too long": lambda d: d.decode(np.zeros(TINY.flow.max_codes - 2, int), v),
        "no part": lambda d: SpeechDecoder(TINY, {}).decode(CODES, ZERO),
        "voice mel": lambda d: d.decode(CODES, v.replace(mel=v.mel[1:])),
        "voice embedding": lambda d: d.decode(CODES, v.replace(embedding=v.embedding[1:])),
        "voice NaN": lambda d: d.decode(CODES, v.replace(mel=v.mel * np.nan)),
        "voice code": lambda d: d.decode(CODES, v.replace(codes=v.codes + 1000)),
        "seed": lambda d: d.stream(ZERO, seed=-1),
        "chunk": lambda d: d.stream(ZERO, chunk=7),
        "empty stream": lambda d: d.stream(ZERO).finish(),
        "stream code": lambda d: d.stream(ZERO).push([TINY.flow.codebook_size]),
        "stream too long": lambda d: d.stream(ZERO).push(np.zeros(TINY.flow.max_codes + 1, int)),
        "empty reference": lambda d: reference_stream(d, ZERO).finish(),
        "reference code": lambda d: reference_stream(d, ZERO).push([TINY.flow.codebook_size]),
        "reference too long": lambda d: reference_stream(d, ZERO).push(np.zeros(TINY.flow.max_codes + 1, int)),
    }[name]


@pytest.mark.parametrize(
    "name, words",
    [
        ("no codes", "expected at least one"),
        ("code too large", "out of range, expected 0..89"),
        ("negative code", "out of range"),
        ("floats", "integer"),
        ("too long", "at most 300"),
        ("no part", "flow.safetensors is missing"),
        ("voice mel", r"expected \[P\] and \[4 P, 8\]"),
        ("voice embedding", r"embedding is \[11\], expected \[12\]"),
        ("voice NaN", "not finite"),
        ("voice code", "out of range"),
        ("seed", "seed is -1"),
        ("chunk", "there is one for: 5"),
        ("empty stream", "expected at least one"),
        ("stream code", "out of range"),
        ("stream too long", "at most 300"),
        ("empty reference", "expected at least one"),
        ("reference code", "out of range"),
        ("reference too long", "at most 300"),
    ],
)
def test_invalid_input_is_reported(decoder, name, words):
    with pytest.raises(MossError, match=words):
        bad(name)(decoder)


@pytest.mark.parametrize("start", [SpeechDecoder.stream, reference_stream], ids=["cached", "reference"])
def test_a_finished_stream_raises(decoder, start):
    stream = start(decoder, ZERO)
    stream.push(CODES[:1])
    stream.finish()
    for call in (stream.finish, lambda: stream.push(CODES[:1])):
        with pytest.raises(MossError, match="finished"):
            call()


def test_config_round_trip_and_contradictions():
    for config in (RELEASED, TINY):
        assert read_config(SpeechDecoderConfig, write_config(config), "test") == config
    with pytest.raises(MossError, match="mel_bins"):
        replace(TINY, vocoder=replace(TINY.vocoder, mel_bins=9))
    with pytest.raises(MossError, match="speaker_size"):
        replace(TINY, flow=replace(TINY.flow, speaker_size=13))
    with pytest.raises(MossError, match="sample_rate"):
        replace(TINY, code_rate=25.0)


@pytest.mark.slow
@pytest.mark.parametrize("name, outputs", [("token2wav_offline", 3), ("token2wav_streaming", 9)])
def test_goldens(golden, name, outputs):
    checks = list(check_golden(read_golden(golden(f"codec/{name}"))))
    assert [c.output for c in checks if not c.passed] == []
    assert len(checks) == outputs

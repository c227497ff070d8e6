"""Streams give the codes of the whole clip, however it is divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.audio.features import log10_mel, log_mel_16k
from moss_jax.errors import MossError
from moss_jax.speech_tokenizer.config import TINY
from moss_jax.speech_tokenizer.encode import SpeechTokenizer
from moss_jax.speech_tokenizer.encoder import Encoder, init_params, init_state
from moss_jax.speech_tokenizer.stream import LogMelStream, WaveStream, log_mel_step, running_log_mel, wave_step
from tests.compilations import compilations

SEGMENT = TINY.codes_per_segment * TINY.frames_per_code


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: init_params(TINY, jax.random.key(0)))()


@pytest.fixture(scope="module")
def whole(params):
    """frames [T, M] -> the codes of every segment in one pass each."""
    encode = jax.jit(Encoder(TINY).apply)

    def run(frames):
        parts = [frames[start : start + SEGMENT] for start in range(0, len(frames), SEGMENT)]
        return np.concatenate([encode({"params": params}, part[None])[0] for part in parts])

    return run


def log_mel(frames, seed=0):
    return np.random.default_rng(seed).normal(size=(frames, 128)).astype(np.float32)


def cut(x, sizes):
    """x in consecutive pieces of these sizes, repeated."""
    place = 0
    turn = 0
    while place < len(x):
        size = sizes[turn % len(sizes)]
        yield x[place : place + size]
        place = place + size
        turn = turn + 1


@pytest.mark.parametrize("chunk", [1, 5])
@settings(max_examples=8, deadline=None)
@given(
    frames=st.sampled_from([1, 7, 8, 13, 100, 121, SEGMENT, 2 * SEGMENT, 2 * SEGMENT + 49]),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=5),
)
def test_log_mel_in_any_portions_gives_the_codes_of_one_pass(params, whole, chunk, frames, sizes):
    x = log_mel(frames, frames)
    stream = LogMelStream(TINY, params, chunk=chunk)
    codes = [stream.push(piece) for piece in cut(x, sizes)]
    assert sum(map(len, codes)) == frames // stream.frames * chunk  # as soon as possible
    np.testing.assert_array_equal(np.concatenate([*codes, stream.finish()]), whole(x))
    np.testing.assert_array_equal(np.concatenate([stream.push(x[:50]), stream.finish()]), whole(x[:50]))  # anew


def test_rows_of_a_batch_of_streams_are_at_different_places(params, whole):
    x = log_mel(3 * 40, 1)
    y = log_mel(SEGMENT + 40, 2)
    one = init_state(TINY, 1)
    for start in range(0, SEGMENT, 40):  # y is at the end of its segment when x begins
        _, one = log_mel_step(TINY, params, y[None, start : start + 40], jnp.array([40]), one)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1 if a.ndim == 5 else 0), init_state(TINY, 1), one)
    codes, both = log_mel_step(TINY, params, np.stack([x[:40], y[SEGMENT:]]), jnp.array([40, 40]), both)
    np.testing.assert_array_equal(codes[0], whole(x)[:5])
    np.testing.assert_array_equal(codes[1], whole(y)[TINY.codes_per_segment :])
    codes, _ = log_mel_step(TINY, params, np.stack([x[40:80], y[:40]]), jnp.array([40, 40]), both)
    np.testing.assert_array_equal(codes[0], whole(x)[5:10])


def voice(samples, seed=0):
    """Noise that grows louder from syllable to syllable, over a faint background."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples)
    return (rng.normal(0, 0.1, samples) * (t % 4000 > 1500) * t / 20000 + rng.normal(0, 1e-4, samples)).astype(
        np.float32
    )


@settings(max_examples=8, deadline=None)
@given(
    samples=st.sampled_from([1, 150, 1279, 1280, 19200, 19201, 19300, 47003]),
    sizes=st.lists(st.integers(1, 20000), min_size=1, max_size=4),
)
def test_a_wave_in_any_portions_gives_the_same_codes(params, samples, sizes):
    wave = voice(samples)
    expected = np.concatenate([(stream := WaveStream(TINY, params)).push(wave), stream.finish()])
    segments, rest = divmod(samples, TINY.samples_per_segment)
    assert len(expected) == segments * TINY.codes_per_segment + -(-rest // 1280)
    stream = WaveStream(TINY, params)
    codes = [*(stream.push(piece) for piece in cut(wave, [max(sizes), *sizes])), stream.finish()]
    np.testing.assert_array_equal(np.concatenate(codes), expected)


def test_with_the_true_maximum_a_wave_gives_the_codes_of_the_whole_clip(params):
    """The log-mel frames are then the same ones, at the reflected ends and in the middle."""
    wave = voice(15000)
    padded = np.pad(wave, (0, 360))
    peak = float(log10_mel(np.pad(padded, 200, mode="reflect")[None])[:, :-1].max())
    stream = WaveStream(TINY, params, start_peak=peak)
    codes = np.concatenate([stream.push(wave), stream.finish()])
    np.testing.assert_array_equal(codes, SpeechTokenizer(TINY, params).encode([wave])[0])


def test_the_running_maximum_lowers_only_what_was_quiet():
    """The frames before the loudest one may be lower than in the whole clip; the others are the same."""
    wave = voice(14080)
    padded = np.pad(wave, 200, mode="reflect")[None, : 87 * 160 + 400]
    ours, peak = running_log_mel(TINY, padded, jnp.array([-9.0]))
    whole = log_mel_16k(wave[None])
    loudest = int(np.argmax(whole[0].max(1)))
    np.testing.assert_allclose(ours[0, loudest:], whole[0, loudest:], atol=1e-6)
    assert loudest > 0 and (ours <= whole).all() and (ours < whole - 0.1).any()
    assert peak[0] == pytest.approx(float(whole.max()) * 4 - 4, abs=1e-5)


def test_no_call_compiles_a_second_time(params):
    wave_step.clear_cache()
    log_mel_step.clear_cache()
    stream = WaveStream(TINY, params)
    frames = LogMelStream(TINY, params)
    with compilations() as compiled:
        assert len(stream.push(voice(6800))) == 5  # one step
        assert len(frames.push(log_mel(50))) == 5
    assert compiled.count("wave_step") == compiled.count("log_mel_step") == 1
    with compilations() as compiled:
        stream.push(voice(30000, 1))
        stream.finish()
        frames.push(log_mel(333))
        frames.finish()
    assert not {"wave_step", "log_mel_step"} & set(compiled)


def test_invalid_input_of_a_stream(params):
    with pytest.raises(MossError, match="chunk is 4, expected a divisor of the 15 codes"):
        LogMelStream(TINY, params, chunk=4)
    with pytest.raises(MossError, match="the pushed wave has NaN"):
        WaveStream(TINY, params).push(np.array([np.nan]))
    assert WaveStream(TINY, params).finish().shape == LogMelStream(TINY, params).finish().shape == (0,)

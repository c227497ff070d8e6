"""Streaming with caches gives the mel of the prefix runs, for every prompt and length and however codes are divided."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.errors import MossError
from moss_jax.speech_decoder.flow import sampler, stream
from moss_jax.speech_decoder.flow.config import TINY
from moss_jax.speech_decoder.flow.noise import noise
from tests.compilations import compilations
from tests.speech_decoder.test_flow import make_codes, make_voice, tiny_params

LONGEST = 80  # codes of prompt and speech in these tests: one static length for the prefix runs


@pytest.fixture(scope="module")
def params():
    return tiny_params(TINY)


@pytest.fixture(scope="module")
def flow(params):
    return stream.CachedFlow(params, TINY)


@pytest.fixture(scope="module")
def reference(params):
    """(codes, voice, finalize) -> the mel of one run with the chunk mask, as in the streams of the reference."""
    runs = {
        finalize: jax.jit(partial(sampler.flow, params, TINY, streaming=True, finalize=finalize))
        for finalize in (True, False)
    }

    def run(codes, voice, finalize=True):
        count = len(voice.codes) + len(codes)
        ids = np.zeros((1, LONGEST), np.int32)
        ids[0, :count] = np.concatenate([voice.codes, codes])
        prompt = np.zeros((1, 4 * LONGEST, TINY.mel_bins), np.float32)
        prompt[0, : len(voice.mel)] = voice.mel
        z = noise(TINY.noise_frames, TINY.mel_bins)
        mel = runs[finalize](z, ids, np.array([count]), prompt, voice.embedding[None])[-1]
        end = count if finalize else count - TINY.lookahead
        return np.asarray(mel[:, len(voice.mel) : 4 * end])

    return run


def delivered(flow, voice, codes, portions=()):
    request = flow.stream(flow.prefill(voice))
    mels = [request.push(part) for part in np.split(codes, list(portions))]
    return np.concatenate([*mels, request.finish()], 1)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_cached_is_the_prefix_run(flow, reference, data):
    prompt = data.draw(st.integers(0, 27))
    count = data.draw(st.integers(1, 50))
    portions = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    voice = make_voice(TINY, prompt)
    codes = make_codes(TINY, count)
    expected = reference(codes, voice)
    ours = delivered(flow, voice, codes, portions)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)
    if count > TINY.lookahead:  # the run that a stream of the reference makes before the end
        early = reference(codes, voice, finalize=False)
        done = (prompt + count - TINY.lookahead) // TINY.chunk * TINY.chunk - prompt
        np.testing.assert_allclose(ours[:, : 4 * max(done, 0)], early[:, : 4 * max(done, 0)], atol=1e-5, rtol=1e-5)


def test_a_prompt_serves_many_requests_and_nothing_is_compiled_again(flow, reference):
    voice = make_voice(TINY, 13)
    prompt = flow.prefill(voice)
    before = jax.tree.map(np.array, prompt.state)
    mels = []
    for count in (9, 9, 17):
        request = flow.stream(prompt)
        mels.append(np.concatenate([request.push(make_codes(TINY, count)), request.finish()], 1))
    np.testing.assert_array_equal(mels[0], mels[1])
    jax.tree.map(np.testing.assert_array_equal, before, prompt.state)
    with compilations() as compiled:
        other = flow.prefill(make_voice(TINY, 22, seed=5))
        request = flow.stream(other)
        request.push(make_codes(TINY, 12))
        request.finish()
    assert compiled == []


@pytest.mark.slow
def test_a_growing_cache_does_not_change_the_mel(params, reference, monkeypatch):
    monkeypatch.setattr(stream, "FIRST_CODES", 10)
    voice = make_voice(TINY, 7)
    codes = make_codes(TINY, 36)
    flow = stream.CachedFlow(params, TINY)
    request = flow.stream(flow.prefill(voice))
    mels = []
    slots = []
    for part in np.split(codes, 4):
        mels.append(request.push(part))
        slots.append(request.state.cache.slots)
    assert slots == [4, 4, 8, 8]
    mel = np.concatenate(mels, 1)
    np.testing.assert_allclose(mel, reference(codes, voice)[:, : mel.shape[1]], atol=1e-5, rtol=1e-5)


def windowed(params, slots, **options):
    return stream.CachedFlow(params, TINY, memory=slots * stream.chunk_bytes(TINY), **options)


@pytest.mark.slow
def test_the_window_keeps_prompt_and_recent_chunks_in_constant_memory(params, flow):
    # 2 chunks prefilled, 1 that straddles: pinned
    voice = make_voice(TINY, 13)
    codes = make_codes(TINY, 75)
    small = windowed(params, 6)
    request = small.stream(small.prefill(voice))
    exact = flow.stream(flow.prefill(voice))
    sizes = set()
    held = []
    differences = []
    for part in np.split(codes, 15):
        ours = request.push(part)
        theirs = exact.push(part)
        differences.append(float(jnp.abs(ours - theirs).max()) if ours.size else 0.0)
        sizes.add(sum(leaf.nbytes for leaf in jax.tree.leaves(request.state)))
        held.append(np.asarray(request.state.cache.chunks).tolist())
    assert len(sizes) == 1
    assert max(differences[:6]) < 1e-5, "exact while everything fits"
    assert differences[12] > 1e-5, "then older context is gone"
    last = int(request.state.chunk) - 1
    assert held[-1][0] == 2 and sorted(held[-1][1:]) == list(range(last - 4, last + 1))


@pytest.mark.slow
def test_a_full_cache_shrinks_to_the_window(params, flow):
    # the first slot is pinned
    voice = make_voice(TINY, 13)
    codes = make_codes(TINY, 95)
    small = windowed(params, 12, window=34)
    assert (small.slots, small.window) == (12, 6)
    request = small.stream(small.prefill(voice))
    exact = flow.stream(flow.prefill(voice))
    frames = TINY.chunk_frames
    before = None
    sizes = []
    differences = []
    for part in np.split(codes, 19):
        cache = jax.tree.map(np.asarray, request.state.cache)
        ours = request.push(part)
        theirs = exact.push(part)
        differences.append(float(np.abs(ours - theirs).max()) if ours.size else 0.0)
        if cache.slots == 12 and request.state.cache.slots == 6:
            before = cache
            after = jax.tree.map(np.asarray, request.state.cache)
        sizes.append(request.state.cache.slots)
    assert before is not None and sizes[-1] == 6 and sizes.index(6) == len(sizes) - sizes[::-1].index(12)
    assert max(differences[: sizes.index(6)]) < 1e-5 < differences[-1]
    # Prompt chunk 2 is pinned; chunks 3 .. 13 followed, of which the last 5 stayed, the oldest of them replaced by 14.
    assert before.chunks.tolist() == list(range(2, 14))
    assert after.chunks[0] == 2 and sorted(after.chunks[1:]) == [10, 11, 12, 13, 14]
    for slot, chunk in enumerate(after.chunks):
        if chunk < 14:
            rows = slice(slot * frames, (slot + 1) * frames)
            old = int(chunk - 2) * frames
            np.testing.assert_array_equal(after.k[..., rows, :], before.k[..., old : old + frames, :])


def test_a_cache_in_bfloat16_is_half_as_large_and_near(params, flow):
    voice = make_voice(TINY, 0)
    codes = make_codes(TINY, 40)
    half = stream.CachedFlow(params, TINY, dtype="bfloat16")
    assert 2 * stream.chunk_bytes(TINY, "bfloat16") == stream.chunk_bytes(TINY)
    exact = flow.stream(flow.prefill(voice))
    near = half.stream(half.prefill(voice))
    assert near.state.cache.k.dtype == jnp.bfloat16
    exact = exact.push(codes)
    near = near.push(codes)
    assert 0 < np.abs(exact - near).max() < 0.1 * np.abs(exact).max()


def test_chunk_bytes_is_the_size_of_the_cache():
    cache = jax.eval_shape(lambda: stream.empty(TINY, 3)).cache
    bytes = sum(leaf.size * leaf.dtype.itemsize for name, leaf in vars(cache).items() if name != "chunks")
    assert bytes == 3 * stream.chunk_bytes(TINY)


def test_temporaries_stay_small_compared_with_the_cache(params):
    """The cache is read in place and written in place: nothing of its size is copied."""
    flow = stream.CachedFlow(params, TINY, memory=2**40)
    state, shared = jax.eval_shape(lambda: (stream.empty(TINY, 60), stream.empty(TINY, 4).cache))
    compiled = flow._step.lower(params, flow.noise, shared, state, np.zeros((1, 8), np.int32)).compile()
    cache = 60 * stream.chunk_bytes(TINY)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache, "the state is updated in place"
    assert memory.temp_size_in_bytes < cache / 4


def test_invalid_streams_raise(params, flow):
    with pytest.raises(MossError, match="hold 3 chunks, expected at least 4"):
        windowed(params, 3)
    request = flow.stream(flow.prefill(make_voice(TINY, 13)))
    with pytest.raises(MossError, match="none in the stream"):
        request.finish()
    with pytest.raises(MossError, match="code 90 at position 1 is out of range"):
        request.push(np.array([3, 90]))
    request.push(np.array([3]))
    with pytest.raises(MossError, match="too long"):
        request.push(np.zeros(287, np.int32))
    with pytest.raises(MossError, match="too long"):
        flow.prefill(make_voice(TINY, 300))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.generate import sampling
from moss_jax.generate.sampling import ChannelSettings
from moss_jax.speech_lm import TINY
from tests.compilations import compilations


def warped(scores, temperature, top_k, top_p):
    """Probabilities by torch in float64: sort, cut, renormalise."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(scores, dtype=torch.float64) / temperature
    if top_k:
        x[x < x.sort(descending=True).values[min(top_k, len(x)) - 1]] = -torch.inf
    if top_p < 1:
        order = x.sort(descending=True, stable=True).indices
        mass = x[order].softmax(0).cumsum(0)
        keep = torch.cat([torch.tensor([True]), mass[:-1] < top_p])
        x[order[~keep]] = -torch.inf
    return x.softmax(0).numpy()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.3, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 20, 1000]),
    top_p=st.sampled_from([1e-6, 0.31, 0.83, 0.95, 1.0]),
    ties=st.booleans(),
)
def test_the_distribution_equals_torch(seed, temperature, top_k, top_p, ties):
    scores = np.random.default_rng(seed).normal(0, 3, 50).astype(np.float32)
    if ties:
        scores = np.round(scores / 2) * 2
    chosen = ChannelSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = jax.nn.softmax(sampling.filter_logits(jnp.array(scores[None]), chosen)[0])
    np.testing.assert_allclose(ours, warped(scores, temperature, top_k, top_p), atol=2e-6)


def test_penalty_and_masks():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0, 0.0]])
    seen = jnp.array([[True, True, False, False, True]])
    scores = sampling.penalise(logits, seen, jnp.array([False, False, False, True, False]), 2.0)
    assert scores.tolist() == [[1.0, -4.0, 2.0, -np.inf, 0.0]]
    assert np.flatnonzero(~sampling.forbid_audio(5, 6, TINY)).tolist() == list(range(TINY.eosp_id))
    assert np.flatnonzero(~sampling.forbid_audio(6, 6, TINY)).tolist() == list(range(TINY.eosp_id + 1))
    assert np.flatnonzero(sampling.forbid_text(317, TINY)).tolist() == [TINY.modality_pad_id, 317, 318, 319]


def test_seen_ids_is_a_set_that_grows():
    ids = jnp.array([[3, 1, 3], [0, 2, 2]])
    counts = jnp.array([[True, True, True], [True, False, False]])
    seen = sampling.seen_ids(ids, counts, 5)
    assert seen.astype(int).tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    seen = sampling.mark_seen(seen, jnp.array([4, 4]), jnp.array([False, True]))
    assert seen.astype(int).tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]


def test_greedy_takes_the_lowest_of_equals():
    greedy = ChannelSettings(greedy=True)
    assert sampling.draw(jnp.array([[1.0, 5.0, 5.0]]), None, greedy).tolist() == [1]


def test_draws_depend_on_request_step_and_channel_alone():
    scores = jnp.zeros((3, 1000))
    chosen = ChannelSettings(temperature=1.0, top_k=0, top_p=1.0)
    keys = sampling.request_keys(7, 3)

    def draw(keys, step, channel):
        return sampling.draw(scores[: len(keys)], sampling.draw_keys(keys, jnp.int32(step), channel), chosen).tolist()

    first = draw(keys, 1, 0)
    assert draw(keys[1:2], 1, 0) == first[1:2]
    others = [draw(keys, 2, 0), draw(keys, 1, 1), draw(sampling.request_keys(8, 3), 1, 0)]
    assert len({tuple(x) for x in [first, *others]}) == 4
    assert len(set(first)) == 3


def test_draws_follow_the_distribution():
    scores = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    chosen = ChannelSettings(temperature=1.0, top_k=3, top_p=1.0)
    keys = sampling.request_keys(0, 4000)
    drawn = sampling.draw(jnp.broadcast_to(scores, (4000, 4)), keys, chosen)
    share = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty"])
def test_numbers_compile_once(field):
    @jax.jit
    def probabilities(scores, chosen):
        return sampling.filter_logits(sampling.penalise(scores, scores > 0, False, chosen.repetition_penalty), chosen)

    scores = jnp.arange(8.0)[None]
    with compilations() as compiled:
        results = [probabilities(scores, ChannelSettings(top_k=4, **{field: value})) for value in (0.5, 0.9)]
    assert compiled.count("probabilities") == 1
    assert (results[0] != results[1]).any()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e30]),
    temperature=st.floats(0.001, 100),
    penalty=st.floats(0.01, 100),
    top_k=st.sampled_from([0, 1, 2, 95, 96, 2**31 - 1]),
    top_p=st.sampled_from([1e-6, 0.5, 1.0]),
    allowed=st.integers(1, 96),
)
def test_allowed_settings_never_draw_what_is_forbidden(seed, scale, temperature, penalty, top_k, top_p, allowed):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray((rng.normal(0, 1, (2, 96)) * scale).astype(np.float32))
    forbidden = np.ones(96, bool)
    forbidden[rng.permutation(96)[:allowed]] = False
    scores = sampling.penalise(logits, jnp.asarray(rng.random((2, 96)) < 0.5), jnp.asarray(forbidden), penalty)
    chosen = ChannelSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    for settings_used in (chosen, ChannelSettings(greedy=True)):
        drawn = sampling.draw(scores, sampling.request_keys(seed, 2), settings_used)
        assert not forbidden[np.asarray(drawn)].any()
        np.testing.assert_array_equal(drawn, sampling.draw(scores, sampling.request_keys(seed, 2), settings_used))
    filtered = np.asarray(sampling.filter_logits(scores, chosen))
    assert not np.isnan(filtered).any() and (filtered > -np.inf).any(1).all() and (filtered < np.inf).all()

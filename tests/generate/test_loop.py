"""The compiled loop against a plain implementation: the whole grid passes both branches at every row."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dev.parity import check_golden, read_golden
from moss_jax.dialogue.grid import pad_left
from moss_jax.generate import ChannelSettings, GenerationSettings, decode_chunk, new_state, prefill, sampling
from moss_jax.speech_lm import TINY, LayerSplitModel
from tests.compilations import compilations

CAPACITY = 80
CHUNK = 16
PAD = TINY.modality_pad_id
EOSP = TINY.eosp_id
SOSP = TINY.sosp_id
END = TINY.im_end_id
TEXT_END = TINY.endoftext_id


def prompt(seed, length, reply):
    """Random rows of text and speech that end like a prompt for this reply."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.integers(0, 256, length), np.full(length, TINY.audio_pad_id)], 1)
    spoken = rng.random(length) < 0.4
    rows[spoken] = np.stack([np.full(length, PAD), rng.integers(0, EOSP, length)], 1)[spoken]
    rows[-1] = (SOSP if reply == "speech" else 10, TINY.audio_pad_id)
    return rows.astype(np.int32)


def run(params, prompts, settings, keys, ks=(1000,), state=None, capacity=CAPACITY, **keywords):
    """The replies of the compiled loop to each prompt: (list of generated rows, state)."""
    rows, valid = pad_left(prompts, TINY)
    state = new_state(TINY, len(prompts), capacity) if state is None else state
    padding = ((0, 0), (0, capacity - rows.shape[1]))
    state = prefill(
        params,
        state,
        np.pad(rows, (*padding, (0, 0))),
        np.pad(valid, padding),
        rows.shape[1],
        keys,
        config=TINY,
        chunk=CHUNK,
    )
    start = int(state.filled)
    for k in ks:
        state = decode_chunk(params, state, settings, k, config=TINY, chunk=CHUNK, **keywords)
    made = np.asarray(state.grid)[:, start : int(state.filled)]
    return [rows[:n] for rows, n in zip(made, state.lengths, strict=True)], state


@functools.cache
def forward():
    return jax.jit(LayerSplitModel(TINY).apply)


@functools.partial(jax.jit, static_argnames="channel")
def drawn(scores, key, step, channel, settings):
    return sampling.draw(scores, sampling.draw_keys(key[None], step, channel), settings)[0]


def plain(params, rows, chosen, key):
    """The reply to one prompt, without caches and with both branches at every row."""
    rows = [tuple(row) for row in rows.tolist()]
    made = []
    mode = int(rows[-1][0] == PAD)
    text_seen = np.isin(np.arange(320), [t for t, _ in rows if t != PAD])
    audio_seen = np.isin(np.arange(96), [a for t, a in rows if t == PAD])
    for step in range(1, chosen.max_new_tokens + 1):
        text, audio = (rows + made)[-1]
        if mode == 1 and audio == EOSP:
            mode = 0
        elif mode == 0 and text == SOSP:
            mode = 1
        whole = np.zeros((1, CAPACITY, 2), np.int32)
        whole[0, : len(rows + made)] = rows + made
        logits = forward()({"params": params}, whole, np.arange(CAPACITY)[None])
        text_logits, audio_logits = (np.array(x)[:, len(rows + made) - 1] for x in logits)
        text_logits[0, [PAD, *range(chosen.text_size, 320)]] = -np.inf
        audio_logits[0, EOSP + 1 :] = -np.inf
        if step < chosen.min_new_tokens:
            audio_logits[0, EOSP] = -np.inf

        def draw(logits, seen, channel, settings, step=step):
            penalty = settings.repetition_penalty
            scores = np.where(seen & (logits > 0), logits / penalty, np.where(seen, logits * penalty, logits))
            return int(drawn(scores, key, step, channel, settings))

        if mode == 1:
            row = PAD, draw(audio_logits, audio_seen, 1, chosen.audio)
            audio_seen[row[1]] = True
        else:
            row = draw(text_logits, text_seen, 0, chosen.text), TINY.audio_pad_id
            text_seen[row[0]] = True
        made.append(row)
        if row[0] in (END, TEXT_END):
            break
    return np.array(made, np.int32)


def chosen_settings(greedy, **keywords):
    text = ChannelSettings(top_k=8, temperature=0.8, repetition_penalty=1.2, greedy=greedy)
    audio = ChannelSettings(top_k=12, top_p=0.9, repetition_penalty=1.1, greedy=greedy)
    return GenerationSettings(text=text, audio=audio, **{"max_new_tokens": 24, "text_size": 315, **keywords})


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [True, False])
def test_the_loop_equals_the_plain_implementation_alone_and_in_batches(params, greedy):
    events = set()

    @settings(max_examples=8, deadline=None, database=None, derandomize=True)
    @given(
        lengths=st.lists(st.integers(1, 40), min_size=3, max_size=3),
        replies=st.lists(st.sampled_from(["speech", "text"]), min_size=3, max_size=3),
        seed=st.integers(0, 10**6),
        min_new=st.sampled_from([0, 5]),
    )
    def check(lengths, replies, seed, min_new):
        chosen = chosen_settings(greedy, min_new_tokens=min_new)
        prompts = [prompt(seed + i, *x) for i, x in enumerate(zip(lengths, replies, strict=True))]
        keys = sampling.request_keys(seed, 3)
        batch, state = run(params, prompts, chosen, keys)
        ends = np.asarray(state.stop)
        for i, rows in enumerate(prompts):
            expected = plain(params, rows, chosen, keys[i])
            np.testing.assert_array_equal(batch[i], expected)
            assert ends[i] == {END: 1, TEXT_END: 2}.get(int(expected[-1, 0]), 0)
            alone, _ = run(params, [rows], chosen, keys[i : i + 1])
            np.testing.assert_array_equal(alone[0], expected)
            spoken = np.concatenate([rows[-1:, 0] == SOSP, expected[:, 0] == PAD])
            events.update((bool(a), bool(b)) for a, b in itertools.pairwise(spoken))
            events.add(int(ends[i]))

    check()
    if not greedy:  # the examples switch in both directions and stop for both reasons
        assert events >= {(True, False), (False, True), (True, True), (False, False), 0, 1}


@settings(max_examples=6, deadline=None, database=None)
@given(cuts=st.lists(st.integers(1, 9), max_size=8), seed=st.integers(0, 10**6))
def test_returning_to_the_host_changes_nothing(params, cuts, seed):
    chosen = chosen_settings(False)
    keys = sampling.request_keys(seed, 3)
    prompts = [prompt(seed + i, 5 + 9 * i, "speech") for i in range(3)]
    whole, _ = run(params, prompts, chosen, keys)
    pieces, _ = run(params, prompts, chosen, keys, ks=[*cuts, 1000])
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a, b)


def poisoned(params, branch):
    """The same weights with NaN in the layers, norm and head of one branch."""
    kept = {"embed": params[branch]["embed"]}
    return params | {branch: jax.tree.map(lambda x: x * jnp.nan, params[branch]) | kept}


def test_a_text_reply_never_touches_the_audio_branch(params):
    chosen = chosen_settings(True)
    keys = sampling.request_keys(0, 3)
    for seed in range(20):
        prompts = [prompt(seed, 30, "text"), prompt(seed + 1, 41, "text"), prompt(seed + 2, 2, "text")]
        expected, state = run(params, prompts, chosen, keys)
        if not any((rows[:, 0] == SOSP).any() for rows in expected):
            break
    assert int(state.done["audio"]) == 0
    made, _ = run(poisoned(params, "audio"), prompts, chosen, keys)
    for a, b in zip(made, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    broken, _ = run(poisoned(params, "text"), prompts, chosen, keys)  # the NaN does have an effect
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(broken, expected, strict=True))


def test_speech_never_touches_the_text_branch_before_it_ends(params):
    chosen = chosen_settings(True, min_new_tokens=1000, max_new_tokens=20)
    prompts = [prompt(3 + i, 30 - i, "speech") for i in range(3)]
    keys = sampling.request_keys(0, 3)
    expected, state = run(params, prompts, chosen, keys)
    assert int(state.done["text"]) == 0
    assert int(state.done["audio"]) == int(state.filled) - 1
    made, _ = run(poisoned(params, "text"), prompts, chosen, keys)
    np.testing.assert_array_equal(made, expected)
    after, state = run(params, prompts, chosen_settings(True, min_new_tokens=0, max_new_tokens=50), keys)
    assert any((rows == [PAD, EOSP]).all(1).any() for rows in after)
    assert int(state.done["text"]) > 30


def test_nothing_compiles_for_other_lengths_and_numbers(params):
    keys = sampling.request_keys(0, 3)
    run(params, [prompt(i, 9 + i, "speech") for i in range(3)], chosen_settings(False), keys)
    other = chosen_settings(False, max_new_tokens=7, min_new_tokens=2)
    other = other.replace(text=other.text.replace(temperature=0.4), audio=other.audio.replace(top_p=0.5))
    with compilations() as compiled:
        run(params, [prompt(2, 40, "text"), prompt(3, 1, "text"), prompt(4, 7, "speech")], other, keys, ks=(2, 3, 9))
    assert not {prefill.__name__, decode_chunk.__name__} & set(compiled)


def test_a_second_turn_on_the_same_state_equals_one_long_prompt(params):
    chosen = chosen_settings(True)
    keys = sampling.request_keys(5, 3)
    first = [prompt(11, 13, "speech"), prompt(12, 8, "text"), prompt(15, 1, "text")]
    made, state = run(params, first, chosen, keys, ks=(6,))
    second = [prompt(13, 5, "text"), prompt(14, 12, "speech"), prompt(16, 9, "speech")]
    reused, state = run(params, second, chosen, keys, state=state)
    whole = [np.concatenate(parts) for parts in zip(first, made, second, strict=True)]
    expected, _ = run(params, whole, chosen, keys)
    for a, b in zip(reused, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_last_column_can_be_used(params):
    chosen = chosen_settings(True, max_new_tokens=1000, min_new_tokens=1000)
    keys = sampling.request_keys(0, 1)
    made, state = run(params, [prompt(3, 70, "speech")], chosen, keys)
    assert int(state.filled) == CAPACITY
    np.testing.assert_array_equal(
        made[0], plain(params, prompt(3, 70, "speech"), chosen.replace(max_new_tokens=10), keys[0])
    )


def test_the_loop_copies_no_cache(params):
    state = jax.eval_shape(lambda: new_state(TINY, 1, 8192))
    caches = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.caches, state.hidden)))
    compiled = decode_chunk.lower(params, state, GenerationSettings(), 5, config=TINY, chunk=2).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < caches / 4
    assert memory.alias_size_in_bytes > caches


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsm_table", "grids", "sampler", "generate", "generate_quirks"])
def test_golden(golden, name):
    checks = list(check_golden(read_golden(golden(f"lm/{name}"))))
    assert len(checks) >= 5
    assert [check for check in checks if not check.passed] == []

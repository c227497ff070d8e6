"""Conversations with the tiny language model: caches kept over turns, dropped turns, files, batches."""

import jax
import numpy as np
import pytest

from moss_jax.dialogue.conversation import LanguageModel, capacity_for
from moss_jax.dialogue.generate import GenerationSettings, decode_chunk, new_state, prefill
from moss_jax.dialogue.grid import DEFAULT_SYSTEM, prompt_grid
from moss_jax.dialogue.sampling import ChannelSettings
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.transformer import TINY

CHANNEL = ChannelSettings(temperature=0.7, top_k=8)
SETTINGS = GenerationSettings(text=CHANNEL, audio=CHANNEL, max_new_tokens=12)
TEXT, SPEECH = Turn("user", text="hello"), Turn("user", codes=list(range(9)))


@pytest.fixture(scope="module")
def model(params, text_tokenizer):
    return LanguageModel(TINY, params, text_tokenizer, context=256)


def answer(model, turns, reply, conversation=None, settings=SETTINGS, seed=0):
    conversation, notices = model.begin(turns, reply, settings, conversation=conversation, seed=seed)
    state = model.go_on(conversation.state, settings, settings.max_new_tokens)
    return conversation.replace(state=state), notices


@pytest.mark.slow
def test_kept_caches_change_nothing(model):
    conversation = None
    for turn, reply in [(TEXT, "speech"), (SPEECH, "text"), (SPEECH, "speech")]:
        conversation, notices = answer(model, [turn], reply, conversation)
        assert notices == []
        assert len(conversation.rows)
    # The last reply again, from the rows of everything before it.
    grids = np.asarray(conversation.state.grid)[0, : conversation.begin]
    whole = Turn("system", text=DEFAULT_SYSTEM["speech"])
    first = prompt_grid([whole, TEXT], "speech", model.text_tokenizer, TINY)
    np.testing.assert_array_equal(grids[: len(first)], first)
    state = new_state(TINY, 1, 256)
    state = model._prefill(state, grids[None], np.ones((1, len(grids)), bool), conversation.state.keys)
    state = model.go_on(state, SETTINGS, SETTINGS.max_new_tokens)
    again = np.asarray(state.grid)[0, len(grids) : int(state.filled)]
    np.testing.assert_array_equal(again, conversation.rows)


def test_turns_are_closed_as_the_template_has_it(model):
    cut = SETTINGS.replace(min_new_tokens=100, max_new_tokens=5)
    conversation, _ = answer(model, [TEXT], "speech", settings=cut)
    assert conversation.running
    spoken = conversation.rows[:, 1]
    conversation, _ = answer(model, [TEXT], "text", conversation)
    written = conversation.rows[:, 0]
    conversation, _ = model.begin([SPEECH], "speech", SETTINGS, conversation=conversation)
    rows = np.asarray(conversation.state.grid)[0, : int(conversation.state.filled)]
    turns = [Turn("system", text=DEFAULT_SYSTEM["speech"]), TEXT, Turn("assistant", codes=spoken), TEXT]
    expected = prompt_grid(turns, "text", model.text_tokenizer, TINY)
    np.testing.assert_array_equal(rows[: len(expected)], expected)
    written = written[:-1] if written[-1] == TINY.im_end_id else written
    after = rows[len(expected) : len(expected) + len(written) + 2, 0].tolist()
    assert after == [*written, *model.text_tokenizer.encode_template("<|im_end|>\n")]
    header = len("?assistant\n")  # one row each
    ends = [len(expected) - header, len(expected) + len(written) + 2, len(rows) - header - 1]
    assert conversation.starts.tolist()[-3:] == ends


def test_twenty_turns_in_a_full_context(model):
    """The oldest turns go and it is told; nothing more is compiled, and no more memory is held."""
    conversation, notices, sizes, compiled = None, [], [], []
    for turn in range(20):
        conversation, told = answer(model, [SPEECH if turn % 2 else TEXT], "speech", conversation, seed=turn)
        notices += told
        jax.block_until_ready(conversation.state)
        sizes.append(sum(array.nbytes for array in jax.live_arrays()))
        compiled.append((prefill._cache_size(), decode_chunk._cache_size()))
        assert int(conversation.state.filled) <= model.context
        system = prompt_grid([Turn("system", text=DEFAULT_SYSTEM["speech"])], "text", model.text_tokenizer, TINY)[:-11]
        np.testing.assert_array_equal(np.asarray(conversation.state.grid)[0, : len(system)], system)
    assert len(notices) > 3
    assert all("is full: the oldest" in notice for notice in notices)
    assert conversation.roles.tolist()[:2] == [0, 1]
    assert len(set(sizes[2:])) == 1
    assert len(set(compiled[2:])) == 1


def test_a_turn_that_cannot_fit(model):
    long = Turn("user", codes=[1] * 300)
    with pytest.raises(MossError, match=r"expected at most 256; shorten the turn or lower max_new_tokens"):
        model.begin([long], "speech", SETTINGS)
    conversation, _ = answer(model, [TEXT], "speech")
    with pytest.raises(MossError, match="the last turn of"):
        model.begin([long], "speech", SETTINGS, conversation=conversation)
    answer(model, [TEXT], "speech", conversation)  # it is still good after the error


def test_saved_and_resumed(model, tmp_path):
    conversation, _ = answer(model, [TEXT], "speech")
    path = tmp_path / "talk.safetensors"
    conversation.save(path)
    expected, _ = answer(model, [SPEECH], "speech", conversation)
    resumed, _ = answer(model, [SPEECH], "speech", model.resume(path))
    np.testing.assert_array_equal(resumed.rows, expected.rows)
    np.testing.assert_array_equal(resumed.starts, expected.starts)
    with pytest.raises(MossError, match="already gone on"):
        model.begin([SPEECH], "speech", SETTINGS, conversation=conversation)
    with pytest.raises(MossError, match="already gone on"):
        conversation.save(path)
    with pytest.raises(MossError, match="cannot be written"):
        resumed.save(tmp_path / "nowhere" / "talk.safetensors")
    other = LanguageModel(TINY, jax.tree.map(lambda x: x + 1, model.params), model.text_tokenizer)
    with pytest.raises(MossError, match="other weights"):
        other.resume(path)
    short = LanguageModel(TINY, model.params, model.text_tokenizer, context=50)
    with pytest.raises(MossError, match="expected at most the context of 50"):
        short.resume(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MossError, match="cut short"):
        model.resume(path)


@pytest.mark.slow
def test_a_batch_answers_as_each_alone(model):
    questions = [[TEXT], [SPEECH], [Turn("system", text="x"), TEXT, Turn("assistant", text="no"), SPEECH]]
    state, start, notices = model.begin_batch(questions, "speech", SETTINGS, seed=3, rows=4)
    state = model.go_on(state, SETTINGS, SETTINGS.max_new_tokens)
    lengths = np.asarray(state.lengths)
    assert lengths[3] == 0 and notices == [[], [], []]
    for i, question in enumerate(questions):
        conversation, _ = model.begin(question, "speech", SETTINGS, seed=3, request=i)
        conversation = conversation.replace(state=model.go_on(conversation.state, SETTINGS, 100))
        np.testing.assert_array_equal(np.asarray(state.grid)[i, start : start + lengths[i]], conversation.rows)


def test_a_batch_tells_which_turns_went(model):
    said = Turn("user", codes=[1] * 60)
    state, _, notices = model.begin_batch([[TEXT], [said, said, said, said, SPEECH]], "speech", SETTINGS)
    assert notices[0] == [] and "full: the oldest" in notices[1][0] and int(state.filled) <= model.context
    with pytest.raises(MossError, match="question 6: context: the last turn of"):
        model.begin_batch([[TEXT], [Turn("user", codes=[1] * 300)]], "speech", SETTINGS, requests=[4, 5])


def test_buckets():
    assert [capacity_for(n, 10240) for n in (1, 256, 257, 600, 9000, 10240)] == [256, 256, 512, 1024, 10240, 10240]


def test_a_context_beyond_the_model_is_refused(params, text_tokenizer):
    with pytest.raises(MossError, match="513 rows, expected 1 to the model's 512"):
        LanguageModel(TINY, params, text_tokenizer, context=513)

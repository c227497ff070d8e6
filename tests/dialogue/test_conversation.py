"""Conversations with the tiny language model: caches kept over turns, dropped turns, files, batches."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from moss_jax.data.formats import ExampleBuilder
from moss_jax.data.manifest import Document
from moss_jax.dialogue.conversation import LanguageModel
from moss_jax.dialogue.grid import prompt_grid
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.generate import ChannelSettings, GenerationSettings, decode_chunk, new_state, prefill
from moss_jax.generate.slots import capacity_for
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.speech_lm import TINY
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT
from tests.compilations import compilations

CHANNEL = ChannelSettings(temperature=0.7, top_k=8)
SETTINGS = GenerationSettings(text=CHANNEL, audio=CHANNEL, max_new_tokens=12)
FORMER = Path(__file__).resolve().parents[1] / "data" / "conversation_1.safetensors"
TEXT = Turn("user", text="hello")
SPEECH = Turn("user", codes=list(range(9)))


@pytest.fixture(scope="module")
def model(params, text_tokenizer):
    return LanguageModel(TINY, params, text_tokenizer, context=256)


def answer(model, turns, reply, conversation=None, settings=SETTINGS, seed=0):
    conversation, notices = model.begin(turns, reply, settings, conversation=conversation, seed=seed)
    state = model.decode(conversation.state, settings, settings.max_new_tokens)
    return conversation.replace(state=state), notices


def prefilled(params, rows, capacity, keys):
    """The state after one prefill of rows int32 [T, 2], padded to the capacity."""
    padded = np.pad(rows, ((0, capacity - len(rows)), (0, 0)))[None]
    valid = np.arange(capacity)[None] < len(rows)
    return prefill(params, new_state(TINY, 1, capacity), padded, valid, len(rows), keys, config=TINY)


@pytest.mark.slow
def test_kept_caches_change_nothing(model):
    conversation = None
    for turn, reply in [(TEXT, "speech"), (SPEECH, "text"), (SPEECH, "speech")]:
        conversation, notices = answer(model, [turn], reply, conversation)
        assert notices == []
        assert len(conversation.rows)
    # The last reply once more, from a prefill of all rows before it.
    grids = np.asarray(conversation.state.grid)[0, : conversation.begin]
    whole = Turn("system", text=DEFAULT_SYSTEM_PROMPT["speech"])
    first = prompt_grid([whole, TEXT], "speech", model.text_tokenizer, TINY)
    np.testing.assert_array_equal(grids[: len(first)], first)
    state = prefilled(model.params, grids, 256, conversation.state.keys)
    state = model.decode(state, SETTINGS, SETTINGS.max_new_tokens)
    again = np.asarray(state.grid)[0, len(grids) : int(state.filled)]
    np.testing.assert_array_equal(again, conversation.rows)


def test_turns_are_closed_as_in_the_template(model):
    cut = SETTINGS.replace(min_new_tokens=100, max_new_tokens=5)
    conversation, _ = answer(model, [TEXT], "speech", settings=cut)
    assert conversation.running
    spoken = conversation.rows[:, 1]
    conversation, _ = answer(model, [TEXT], "text", conversation)
    written = conversation.rows[:, 0]
    conversation, _ = model.begin([SPEECH], "speech", SETTINGS, conversation=conversation)
    rows = np.asarray(conversation.state.grid)[0, : int(conversation.state.filled)]
    turns = [Turn("system", text=DEFAULT_SYSTEM_PROMPT["speech"]), TEXT, Turn("assistant", codes=spoken), TEXT]
    expected = prompt_grid(turns, "text", model.text_tokenizer, TINY)
    np.testing.assert_array_equal(rows[: len(expected)], expected)
    written = written[:-1] if written[-1] == TINY.im_end_id else written
    after = rows[len(expected) : len(expected) + len(written) + 2, 0].tolist()
    assert after == [*written, *model.text_tokenizer.encode_template("<|im_end|>\n")]
    header = len("?assistant\n")  # one row each
    ends = [len(expected) - header, len(expected) + len(written) + 2, len(rows) - header - 1]
    assert conversation.starts.tolist()[-3:] == ends


def test_twenty_turns_in_a_full_context(model):
    """The oldest turns are dropped with a notice; nothing more is compiled, and no more memory is used."""
    conversation = None
    notices = []
    sizes = []
    for turn in range(20):
        with compilations() as compiled:
            conversation, new_notices = answer(model, [SPEECH if turn % 2 else TEXT], "speech", conversation, seed=turn)
            jax.block_until_ready(conversation.state)
        assert turn <= 2 or not {prefill.__name__, decode_chunk.__name__} & set(compiled)
        notices += new_notices
        sizes.append(sum(array.nbytes for array in jax.live_arrays()))
        assert int(conversation.state.filled) <= model.context
        system = prompt_grid(
            [Turn("system", text=DEFAULT_SYSTEM_PROMPT["speech"])], "text", model.text_tokenizer, TINY
        )[:-11]
        np.testing.assert_array_equal(np.asarray(conversation.state.grid)[0, : len(system)], system)
    assert len(notices) > 3
    assert all("is full: the oldest" in notice for notice in notices)
    assert conversation.roles.tolist()[:2] == [0, 1]
    assert len(set(sizes[2:])) == 1


def test_a_turn_that_cannot_fit(model):
    long = Turn("user", codes=[1] * 300)
    with pytest.raises(MossError, match=r"expected at most 256; shorten the turn or lower max_new_tokens"):
        model.begin([long], "speech", SETTINGS)
    conversation, _ = answer(model, [TEXT], "speech")
    with pytest.raises(MossError, match="the last turn of"):
        model.begin([long], "speech", SETTINGS, conversation=conversation)
    answer(model, [TEXT], "speech", conversation)  # it can still be continued after the error


def test_saved_and_resumed(model, tmp_path):
    conversation, _ = answer(model, [TEXT], "speech")
    path = tmp_path / "talk.safetensors"
    conversation.save(path)
    expected, _ = answer(model, [SPEECH], "speech", conversation)
    resumed, _ = answer(model, [SPEECH], "speech", model.resume(path))
    np.testing.assert_array_equal(resumed.rows, expected.rows)
    np.testing.assert_array_equal(resumed.starts, expected.starts)
    with pytest.raises(MossError, match="already been continued"):
        model.begin([SPEECH], "speech", SETTINGS, conversation=conversation)
    with pytest.raises(MossError, match="already been continued"):
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


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("audio", lambda x: x + 1),
        ("shared", lambda x: x * 0),
        ("text/head/kernel", lambda x: x.at[-1, -1].add(0.5)),
        ("shared/layers/mlp/down/kernel", lambda x: x.at[-1, 3, 5].multiply(1.001)),
        ("audio/norm/scale", lambda x: x.at[7].multiply(-1)),
    ],
)
def test_any_other_weights_are_other_weights(model, tmp_path, path, change):
    flat = flatten(model.params)
    changed = {name: change(x) if name == path or name.startswith(f"{path}/") else x for name, x in flat.items()}
    assert any(changed[name] is not x for name, x in flat.items())
    conversation, _ = answer(model, [TEXT], "speech")
    conversation.save(tmp_path / "talk.safetensors")
    other = LanguageModel(TINY, unflatten(changed), model.text_tokenizer, context=256)
    with pytest.raises(MossError, match="other weights"):
        other.resume(tmp_path / "talk.safetensors")
    same = LanguageModel(TINY, jax.tree.map(jnp.array, model.params), model.text_tokenizer, context=256)
    assert same.resume(tmp_path / "talk.safetensors").language_model is same
    turned = LanguageModel(replace(TINY, rope_theta=1e5), model.params, model.text_tokenizer, context=256)
    with pytest.raises(MossError, match="other weights"):
        turned.resume(tmp_path / "talk.safetensors")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """Metadata and tensors of a saved conversation of two replies."""
    conversation, _ = answer(model, [TEXT], "speech")
    conversation, _ = answer(model, [SPEECH], "text", conversation)
    path = tmp_path_factory.mktemp("saved") / "talk.safetensors"
    conversation.save(path)
    with safe_open(path, "numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "place", "value", "says"),
    [
        ("state/grid", (0, 3, 0), 10**9, "a text id is out of range"),
        ("state/grid", (0, 3, 0), -1, "a text id is out of range"),
        ("state/grid", (0, 3, 1), TINY.audio_vocab_size, "an audio id is out of range"),
        ("state/valid", (0, 2), False, "padding"),
        ("state/filled", (), 3, "filled is 3"),
        ("state/filled", (), -1, "filled is -1"),
        ("state/lengths", (0,), 10**6, "rows long"),
        ("state/step", (), -2, "rows long"),
        ("state/mode", (0,), 7, "mode"),
        ("state/modes", (0, 1), 2, "mode"),
        ("state/stop", (0,), 9, "reason"),
        ("state/done/audio", (), 10**6, "more columns are done"),
        ("state/done/shared", (), -1, "more columns are done"),
        ("state/hidden", (0, 1, 1), np.nan, "not finite"),
        ("state/caches/shared/k", (1, 0, 2, 0, 0), np.nan, "not finite"),
        ("state/caches/audio/v", (0, 0, 1, 0, 0), np.inf, "not finite"),
        ("roles", (1,), 77, "role"),
        ("roles", (0,), -1, "role"),
        ("roles", (-1,), 1, "assistant"),
        ("starts", (0,), 5, "one after the other"),
        ("starts", (1,), 0, "one after the other"),
        ("starts", slice(None, None, -1), None, "one after the other"),
        ("starts", (-1,), 10**6, "one after the other"),
        ("replies", (), -5, "replies is -5"),
        ("replies", (), 0, "replies is 0"),
        ("begin", (), 0, "begin is 0"),
        ("begin", (), 10**6, "begin is 1000000"),
    ],
)
def test_impossible_contents(model, saved, tmp_path, name, place, value, says):
    metadata, tensors = saved
    tensor = tensors[name].copy()
    if value is None:
        tensor = np.ascontiguousarray(tensor[place])
    else:
        tensor[place] = value
    save_file(tensors | {name: tensor}, tmp_path / "talk.safetensors", metadata)
    with pytest.raises(MossError, match=f"talk.safetensors: damaged conversation, .*{says}"):
        model.resume(tmp_path / "talk.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("state/grid", np.zeros((1, 0, 2), np.int32)),
        ("state/grid", np.zeros((1, 4), np.int32)),
        ("state/grid", np.zeros(0, np.int32)),
        ("state/filled", np.array([1, 2], np.int32)),
        ("starts", np.zeros((), np.int32)),
        ("starts", np.zeros(0, np.int32)),
        ("roles", np.zeros(1, np.int32)),
        ("replies", np.array(1.0, np.float32)),
        ("begin", np.array(9, np.int64)),
        ("state/keys", np.zeros((1, 3), np.uint32)),
    ],
)
def test_impossible_shapes(model, saved, tmp_path, name, tensor):
    metadata, tensors = saved
    save_file(tensors | {name: tensor}, tmp_path / "talk.safetensors", metadata)
    with pytest.raises(MossError, match=f"talk.safetensors: damaged conversation, these do not fit: .*{name}"):
        model.resume(tmp_path / "talk.safetensors")


def test_a_conversation_of_the_former_format_is_resumed(params, text_tokenizer, tmp_path):
    """The file was saved by an earlier version with the parameters of `random_params` (seed 1) and this embedding row.

    Its turns are "Hi." as the system turn, the codes 3, 1, 4 and a greedy spoken reply of 6 rows.
    """
    row = jnp.arange(TINY.hidden_size, dtype=jnp.float32) / 1024
    flat = flatten(params)
    flat["text/embed/embedding"] = flat["text/embed/embedding"].at[TINY.im_start_id].set(row)
    model = LanguageModel(TINY, unflatten(flat), text_tokenizer, context=256)
    greedy = ChannelSettings(greedy=True)
    settings = GenerationSettings(text=greedy, audio=greedy, max_new_tokens=6)
    resumed = model.resume(FORMER)
    turns = [Turn("system", text="Hi."), Turn("user", codes=[3, 1, 4])]
    fresh, _ = answer(model, turns, "speech", settings=settings)
    np.testing.assert_array_equal(resumed.rows, [[TINY.modality_pad_id, code] for code in (63, 77, 71, 77, 48, 36)])
    np.testing.assert_array_equal(resumed.rows, fresh.rows)
    assert resumed.running and resumed.starts.tolist() == [0, 13, 26] and resumed.roles.tolist() == [0, 1, 2]
    resumed.save(tmp_path / "talk.safetensors")
    again = model.resume(tmp_path / "talk.safetensors")
    expected, _ = answer(model, [TEXT], "text", fresh, settings=settings)
    for conversation in (resumed, again):
        found, _ = answer(model, [TEXT], "text", conversation, settings=settings)
        np.testing.assert_array_equal(found.rows, expected.rows)
    # Its fingerprint covers one row of the weights only, so the caches in it are recomputed. (With 512 columns: a
    # chunk of the prefill has 256, and would run all columns of a smaller state again.)
    flat["shared/layers/mlp/down/kernel"] = flat["shared/layers/mlp/down/kernel"] * 0
    other = LanguageModel(TINY, unflatten(flat), text_tokenizer, context=512)
    long = settings.replace(max_new_tokens=300)
    found, _ = other.begin([TEXT], "text", long, conversation=other.resume(FORMER))
    grid = np.asarray(found.state.grid)[0, : found.begin]
    state = prefilled(other.params, grid, 512, found.state.keys)
    np.testing.assert_allclose(found.state.hidden[0, : len(grid) - 1], state.hidden[0, : len(grid) - 1], atol=1e-4)
    with pytest.raises(MossError, match="other weights"):
        LanguageModel(TINY, params, text_tokenizer, context=256).resume(FORMER)


def test_a_conversation_of_another_language_model(model):
    conversation, _ = answer(model, [TEXT], "speech")
    other = LanguageModel(TINY, model.params, model.text_tokenizer, context=256)
    with pytest.raises(MossError, match="belongs to another language model"):
        other.begin([SPEECH], "speech", SETTINGS, conversation=conversation)


@pytest.mark.parametrize("reply", ["speech", "text"])
def test_training_and_generation_begin_alike(model, reply):
    """Without a system turn, the prompt in generation is the prompt in training."""
    answered = Turn("assistant", codes=[1, 2]) if reply == "speech" else Turn("assistant", text="yes")
    document = Document(1, "a", turns=(TEXT, answered))
    codes = [None, answered.codes]
    trained = ExampleBuilder("chat", TINY, model.text_tokenizer).example(document, codes).grid
    prompt = prompt_grid([TEXT], reply, model.text_tokenizer, TINY)
    np.testing.assert_array_equal(trained[: len(prompt)], prompt)
    conversation, _ = model.begin([TEXT], reply, SETTINGS)
    np.testing.assert_array_equal(np.asarray(conversation.state.grid)[0, : conversation.begin], prompt)
    state, begin, _ = model.begin_batch([[TEXT]], reply, SETTINGS)
    np.testing.assert_array_equal(np.asarray(state.grid)[0, :begin], prompt)


@pytest.mark.slow
def test_a_batch_answers_as_each_alone(model):
    questions = [[TEXT], [SPEECH], [Turn("system", text="x"), TEXT, Turn("assistant", text="no"), SPEECH]]
    state, start, notices = model.begin_batch(questions, "speech", SETTINGS, seed=3, rows=4)
    state = model.decode(state, SETTINGS, SETTINGS.max_new_tokens)
    lengths = np.asarray(state.lengths)
    assert lengths[3] == 0 and notices == [[], [], []]
    for i, question in enumerate(questions):
        conversation, _ = model.begin(question, "speech", SETTINGS, seed=3, request=i)
        conversation = conversation.replace(state=model.decode(conversation.state, SETTINGS, 100))
        np.testing.assert_array_equal(np.asarray(state.grid)[i, start : start + lengths[i]], conversation.rows)


def test_a_batch_reports_dropped_turns(model):
    long = Turn("user", codes=[1] * 60)
    state, _, notices = model.begin_batch([[TEXT], [long, long, long, long, SPEECH]], "speech", SETTINGS)
    assert notices[0] == [] and "full: the oldest" in notices[1][0] and int(state.filled) <= model.context
    with pytest.raises(MossError, match="question 6: context: the last turn of"):
        model.begin_batch([[TEXT], [Turn("user", codes=[1] * 300)]], "speech", SETTINGS, requests=[4, 5])


def test_buckets():
    assert [capacity_for(n, 10240) for n in (1, 256, 257, 600, 9000, 10240)] == [256, 256, 512, 1024, 10240, 10240]


def test_a_context_beyond_the_model_is_refused(params, text_tokenizer):
    with pytest.raises(MossError, match="513 rows, expected 1 to the model's 512"):
        LanguageModel(TINY, params, text_tokenizer, context=513)

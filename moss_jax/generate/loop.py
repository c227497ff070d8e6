"""Generation as one compiled loop over the two-channel grid, which comes up for air every k rows.

A batch shares its physical columns: row b of column t is real where `valid[b, t]`, so prompts are padded on the left,
and a row that has ended is padded on the right while the others go on. Every column passes the shared block once; what
comes out (`hidden`) is kept, because a branch reads nothing else. So the branch that no row speaks with stands still:
`done` says how many columns it has seen, and when a row turns to it the missing columns go through it in chunks. A text
reply never touches the audio branch, and a spoken reply the text branch only once its speech has ended.

Everything here is compiled once for a batch size and a capacity; prompt lengths, k and most settings are data. `compat`
follows the reference step by step, both branches at every row.

Dimension letters: B batch, S columns of capacity, W columns of a call, D embed, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moss_jax.dialogue.grid import positions_of
from moss_jax.generate import sampling
from moss_jax.generate.sampling import ChannelSettings
from moss_jax.generate.settings import DEFAULTS
from moss_jax.generate.state_machine import AUDIO, RUNNING, TEXT, embeds_audio, initial_mode, next_mode, stop_reason
from moss_jax.speech_lm import KVCache, LayerSplitModel, SpeechLMConfig, init_cache

BRANCHES = {"text": TEXT, "audio": AUDIO}
CHUNK = 256  # columns a call when many are pending: wide enough that arithmetic, not reading weights, takes the time


@struct.dataclass
class GenerationSettings:
    """How a reply is made; the defaults are the released driver's. Only `compat` is compiled in, and of the channels
    `top_k` and `greedy`."""

    text: ChannelSettings = ChannelSettings()
    audio: ChannelSettings = ChannelSettings()
    max_new_tokens: int = DEFAULTS["max_new_tokens"]  # rows of a reply, its closing row included
    min_new_tokens: int = DEFAULTS["min_new_tokens"]  # speech may not end before this row of the reply
    text_size: int = 2**31 - 1  # text ids from here on have no token and are never drawn (not in `compat`)
    compat: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class GenerationState:
    """Everything that a batch of conversations is, between two calls. Columns from `filled` on hold nothing."""

    grid: jax.Array  # int32 [B, S, 2]
    valid: jax.Array  # bool [B, S]
    modes: jax.Array  # int8 [B, S], the mode in which a generated row was sampled
    filled: jax.Array  # int32 [], columns of the grid; the last one has not passed any block yet
    hidden: jax.Array  # [B, S, D], output of the shared block
    caches: dict[str, KVCache]  # of "shared", "text", "audio"
    done: dict[str, jax.Array]  # int32 [] each, columns that passed the block
    seen: dict[str, jax.Array]  # bool [B, V] each, ids of a channel that the repetition penalty counts
    keys: jax.Array  # PRNG keys [B], one a request
    mode: jax.Array  # int32 [B], in which the last row was sampled
    step: jax.Array  # int32 [], rows of the current reply
    running: jax.Array  # bool [B], rows whose reply goes on
    stop: jax.Array  # int32 [B], stop reason of each row; RUNNING also when a reply was cut
    lengths: jax.Array  # int32 [B], rows of each current reply
    logits: dict[str, jax.Array]  # float32 [B, V] each, of the latest step; zero where a branch did not run

    @property
    def capacity(self) -> int:
        return self.grid.shape[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def new_state(config: SpeechLMConfig, batch: int, capacity: int) -> GenerationState:
    """The state of `batch` conversations in which nobody has said anything, with room for `capacity` columns."""
    vocab = {"text": config.text_vocab_size, "audio": config.audio_vocab_size}

    def zeros(*shape, dtype=jnp.int32):
        return jnp.zeros(shape, dtype)

    return GenerationState(
        grid=zeros(batch, capacity, 2),
        valid=zeros(batch, capacity, dtype=bool),
        modes=zeros(batch, capacity, dtype=jnp.int8),
        filled=zeros(),
        hidden=zeros(batch, capacity, config.hidden_size, dtype=config.dtype),
        caches=init_cache(config, batch, capacity),
        done={name: zeros() for name in ("shared", *BRANCHES)},
        seen={name: zeros(batch, size, dtype=bool) for name, size in vocab.items()},
        keys=sampling.request_keys(0, batch),
        mode=zeros(batch),
        step=zeros(),
        running=zeros(batch, dtype=bool),
        stop=zeros(batch),
        lengths=zeros(batch),
        logits={name: zeros(batch, size, dtype=jnp.float32) for name, size in vocab.items()},
    )


@functools.partial(jax.jit, donate_argnames="state")
def emptied(state: GenerationState) -> GenerationState:
    """The same buffers (`state` is donated) with nothing said yet."""
    zero = jnp.zeros((), jnp.int32)
    return state.replace(
        valid=jnp.zeros_like(state.valid),
        filled=zero,
        done={name: zero for name in state.done},
        seen=jax.tree.map(jnp.zeros_like, state.seen),
    )


def with_capacity(state: GenerationState, capacity: int) -> GenerationState:
    """The same conversations with more or fewer columns, at least `filled`. Leaves are numpy or jax arrays."""

    def fit(leaf, axis):
        xp = np if isinstance(leaf, np.ndarray) else jnp
        leaf = leaf[(slice(None),) * axis + (slice(capacity),)]
        return xp.pad(leaf, [(0, capacity - leaf.shape[axis] if i == axis else 0) for i in range(leaf.ndim)])

    return state.replace(
        **{name: fit(getattr(state, name), 1) for name in ("grid", "valid", "modes", "hidden")},
        caches={name: KVCache(fit(cache.k, 2), fit(cache.v, 2)) for name, cache in state.caches.items()},
    )


@functools.partial(jax.jit, static_argnames=("config", "compat", "chunk"), donate_argnames="state")
def prefill(
    params,
    state: GenerationState,
    rows: jax.Array,
    valid: jax.Array,
    count: jax.Array | int,
    keys: jax.Array,
    *,
    config: SpeechLMConfig,
    compat: bool = False,
    chunk: int = CHUNK,
) -> GenerationState:
    """Appends columns to the conversations and begins a reply; all columns but the last pass the shared block.

    Args:
        params: of LayerSplitModel.
        state: donated. `filled + count` must not exceed its capacity.
        rows, valid: int32 [B, W, 2] and bool [B, W], padded on the left; only the first `count` columns are taken. A
            row of padding alone is asked for no reply.
        keys: PRNG keys [B] for the draws of this reply.
    """
    capacity = state.capacity
    width = rows.shape[1]
    columns = state.filled + jnp.arange(width)
    columns = jnp.where(jnp.arange(width) < count, columns, capacity)  # the others fall off the end
    valid = valid & (jnp.arange(width) < count)
    text = rows[..., 0]
    audio = rows[..., 1]
    spoken = embeds_audio(text, config)
    counts = (valid, valid) if compat else (valid & ~spoken, valid & spoken)
    seen = {
        name: state.seen[name] | sampling.seen_ids(ids, count, state.seen[name].shape[1])
        for name, ids, count in zip(BRANCHES, (text, audio), counts, strict=True)
    }
    last = jax.lax.dynamic_index_in_dim(rows, count - 1, 1, keepdims=False)
    batch = rows.shape[0]
    state = state.replace(
        grid=state.grid.at[:, columns].set(rows, mode="drop"),
        valid=state.valid.at[:, columns].set(valid, mode="drop"),
        filled=state.filled + count,
        seen=seen,
        keys=keys,
        mode=initial_mode(last[:, 0], last[:, 1], config, compat).astype(jnp.int32),
        step=jnp.zeros((), jnp.int32),
        running=valid.any(1),
        stop=jnp.full(batch, RUNNING, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
    )
    chunk = min(chunk, capacity)
    last = state.filled - 1
    run = functools.partial(_run_columns, LayerSplitModel(config), params, state, positions_of(state.valid), "shared")

    def pass_chunk(carry):
        done, cache, hidden = carry
        start, y, cache = run(done, cache, chunk)
        return jnp.minimum(start + chunk, last), cache, jax.lax.dynamic_update_slice_in_dim(hidden, y, start, 1)

    carry = state.done["shared"], state.caches["shared"], state.hidden
    done, cache, hidden = jax.lax.while_loop(lambda carry: carry[0] < last, pass_chunk, carry)
    return state.replace(hidden=hidden, caches=state.caches | {"shared": cache}, done=state.done | {"shared": done})


@functools.partial(jax.jit, static_argnames=("config", "chunk"), donate_argnames="state")
def decode_chunk(
    params,
    state: GenerationState,
    settings: GenerationSettings,
    k: jax.Array | int,
    *,
    config: SpeechLMConfig,
    chunk: int = CHUNK,
) -> GenerationState:
    """Generates up to `k` rows; fewer when every reply has ended, is `max_new_tokens` long, or the columns run out.

    `state` is donated. `params` and `config` are those of the prefill.
    """
    model = LayerSplitModel(config)
    first = state.step

    def goes_on(state):
        room = (state.step < settings.max_new_tokens) & (state.filled < state.capacity)
        return (state.step - first < k) & room & state.running.any()

    return jax.lax.while_loop(
        goes_on, lambda state: _step(model, params, state, settings, min(chunk, state.capacity)), state
    )


def _step(model, params, state: GenerationState, settings: GenerationSettings, chunk: int) -> GenerationState:
    """One more row: the last column goes through the blocks that are asked, and a new column is appended."""
    config = model.config
    compat = settings.compat
    last = jax.lax.dynamic_index_in_dim(state.grid, state.filled - 1, 1, keepdims=False)
    mode = next_mode(state.mode, last[:, 0], last[:, 1], config, compat)
    run = functools.partial(_run_columns, model, params, state, positions_of(state.valid))
    _, hidden, cache = run("shared", state.filled - 1, state.caches["shared"], 1)
    state = state.replace(
        hidden=jax.lax.dynamic_update_slice_in_dim(state.hidden, hidden, state.filled - 1, 1),
        caches=state.caches | {"shared": cache},
        done=state.done | {"shared": state.filled},
    )
    step = state.step + 1
    forbidden = {
        "text": False if compat else sampling.forbid_text(settings.text_size, config),
        "audio": sampling.forbid_audio(step, settings.min_new_tokens, config),
    }
    drawn = {}
    logits = {}
    done = dict(state.done)
    caches = dict(state.caches)
    for branch, channel in BRANCHES.items():
        channel_settings = getattr(settings, branch)

        def draw(y, branch=branch, channel=channel, settings=channel_settings):
            logits = model.apply({"params": params}, branch, y, method="logits")[:, 0]
            scores = sampling.penalise(logits, state.seen[branch], forbidden[branch], settings.repetition_penalty)
            return logits, sampling.draw(scores, sampling.draw_keys(state.keys, step, channel), settings)

        asked = jnp.array(True) if compat else (state.running & (mode == channel)).any()
        drawing = _pass_branch(model, params, state, branch, asked, chunk, draw)
        done[branch], caches[branch], logits[branch], drawn[branch] = drawing

    speaking = mode == AUDIO
    running = state.running
    text = jnp.where(speaking, config.modality_pad_id, drawn["text"])
    audio = drawn["audio"] if compat else jnp.where(speaking, drawn["audio"], config.audio_pad_id)
    counted = {
        "text": running if compat else running & ~speaking,
        "audio": running if compat else running & speaking,
    }
    row = jnp.stack([jnp.where(running, text, config.endoftext_id), jnp.where(running, audio, config.audio_pad_id)], -1)
    stop = jnp.where(running, stop_reason(text, config), state.stop)
    at = (0, state.filled)
    return state.replace(
        grid=jax.lax.dynamic_update_slice(state.grid, row[:, None].astype(jnp.int32), (*at, 0)),
        valid=jax.lax.dynamic_update_slice(state.valid, running[:, None], at),
        modes=jax.lax.dynamic_update_slice(state.modes, mode[:, None].astype(jnp.int8), at),
        filled=state.filled + 1,
        caches=caches,
        done=done,
        seen={
            "text": sampling.mark_seen(state.seen["text"], text, counted["text"]),
            "audio": sampling.mark_seen(state.seen["audio"], audio, counted["audio"]),
        },
        mode=mode.astype(jnp.int32),
        step=step,
        running=running & (stop == RUNNING),
        stop=stop.astype(jnp.int32),
        lengths=state.lengths + running,
        logits=logits,
    )


def _pass_branch(model, params, state: GenerationState, branch: str, asked: jax.Array, chunk: int, draw):
    """If `asked`, runs all columns that the branch has not seen, in chunks those before the last one, and draws.

    Loops rather than conditionals, because their buffers stay in place. Returns (done, cache, logits, ids).
    """
    last = state.filled - 1
    run = functools.partial(_run_columns, model, params, state, positions_of(state.valid), branch)

    def catch_up(carry):
        start, _, cache = run(*carry, chunk)
        return jnp.minimum(start + chunk, last), cache

    def answer(carry):
        _, y, cache = run(*carry[:2], 1)
        return last + 1, cache, *draw(y)

    done = state.done[branch]
    cache = state.caches[branch]
    done, cache = jax.lax.while_loop(lambda carry: asked & (carry[0] < last), catch_up, (done, cache))
    silent = jnp.zeros_like(state.logits[branch]), jnp.zeros_like(state.lengths)
    return jax.lax.while_loop(lambda carry: asked & (carry[0] <= last), answer, (done, cache, *silent))


def _run_columns(model, params, state: GenerationState, positions, name: str, done, cache: KVCache, width: int):
    """Runs `width` columns from `done` on through a block. Returns (first column, y [B, width, D], cache)."""
    # A slice must not run over the end. Starting earlier repeats columns, which changes nothing.
    start = jnp.minimum(done, state.capacity - width)
    if name == "shared":
        x = model.apply({"params": params}, _columns(state.grid, start, width), method="embed")
    else:
        x = _columns(state.hidden, start, width)
    y, cache = model.apply(
        {"params": params},
        name,
        x,
        _columns(positions, start, width),
        cache=cache,
        index=start,
        valid=state.valid,
        method="block",
    )
    return start, y, cache


def _columns(x: jax.Array, start: jax.Array, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, width, 1)

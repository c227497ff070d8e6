"""Generation as one compiled loop over the two-channel grid, which returns to the host every k rows.

Every column passes the shared block once; its output (`hidden`) is kept, because it is all that the branches read. A
branch that no row samples from does not run: `done` counts the columns that have passed it, and when a row switches to
it, the missing columns pass it in chunks. So a text reply never runs the audio branch, and a spoken reply runs the text
branch only after its speech has ended.

Everything here is compiled once for a batch size and a capacity; prompt lengths, k and most settings are data.

Dimension letters: B batch, S columns of capacity, T columns of a call, D embed, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moss_jax.generate import sampling
from moss_jax.generate.sampling import ChannelSettings, GenerationSettings
from moss_jax.generate.slots import BRANCHES, GenerationState, positions_of
from moss_jax.generate.state_machine import AUDIO, DEFAULT_RULES, RUNNING, TEXT, Rules, embeds_audio, stop_reason
from moss_jax.speech_lm import KVCache, LayerSplitModel, SpeechLMConfig

CHUNK = 256  # columns per call when many are pending: enough that arithmetic takes the time, not reading the weights

# From the hidden output of the last column to the logits [B, V] and the sampled ids [B] of a branch.
_Sample = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@functools.partial(jax.jit, static_argnames=("config", "chunk", "rules"), donate_argnames="state")
def prefill(
    params: Any,
    state: GenerationState,
    rows: jax.Array,
    valid: jax.Array,
    count: jax.Array | int,
    keys: jax.Array,
    *,
    config: SpeechLMConfig,
    chunk: int = CHUNK,
    rules: Rules = DEFAULT_RULES,
) -> GenerationState:
    """Appends columns to the conversations and starts a reply; all columns but the last pass the shared block.

    Args:
        params: of LayerSplitModel.
        state: donated. `filled + count` must not exceed its capacity.
        rows, valid: int32 [B, T, 2] and bool [B, T], padded on the left; only the first `count` columns are used. A row
            that is all padding gets no reply.
        count: int32 [], columns to append.
        keys: PRNG keys [B] for the draws of this reply.
        chunk: columns that pass the shared block per call of it.
        rules: see there.
    """
    capacity = state.capacity
    width = rows.shape[1]
    columns = state.filled + jnp.arange(width)
    columns = jnp.where(jnp.arange(width) < count, columns, capacity)  # mode="drop" below leaves the others out
    valid = valid & (jnp.arange(width) < count)[None]
    text = rows[..., 0]
    audio = rows[..., 1]
    active = rules.active_channels(jnp.where(embeds_audio(text, config), AUDIO, TEXT))
    seen = {
        name: state.seen[name] | sampling.seen_ids(ids, valid & active[name], state.seen[name].shape[1])
        for name, ids in (("text", text), ("audio", audio))
    }
    last_row = jax.lax.dynamic_index_in_dim(rows, count - 1, 1, keepdims=False)
    batch = rows.shape[0]
    state = dataclasses.replace(
        state,
        grid=state.grid.at[:, columns].set(rows, mode="drop"),
        valid=state.valid.at[:, columns].set(valid, mode="drop"),
        filled=state.filled + count,
        seen=seen,
        keys=keys,
        mode=rules.initial_mode(last_row[:, 0], last_row[:, 1], config).astype(jnp.int32),
        step=jnp.zeros((), jnp.int32),
        running=valid.any(1),
        stop=jnp.full(batch, RUNNING, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
    )
    chunk = min(chunk, capacity)
    last = state.filled - 1
    run = functools.partial(_run_columns, LayerSplitModel(config), params, state, positions_of(state.valid), "shared")

    def run_chunk(carry: tuple[jax.Array, KVCache, jax.Array]) -> tuple[jax.Array, KVCache, jax.Array]:
        done, cache, hidden = carry
        start, y, cache = run(done, cache, chunk)
        return jnp.minimum(start + chunk, last), cache, jax.lax.dynamic_update_slice_in_dim(hidden, y, start, 1)

    carry = (state.done["shared"], state.caches["shared"], state.hidden)
    done, cache, hidden = jax.lax.while_loop(lambda carry: carry[0] < last, run_chunk, carry)
    return dataclasses.replace(
        state,
        hidden=hidden,
        caches=state.caches | {"shared": cache},
        done=state.done | {"shared": done},
    )


@functools.partial(jax.jit, static_argnames=("config", "chunk", "rules"), donate_argnames="state")
def decode_chunk(
    params: Any,
    state: GenerationState,
    settings: GenerationSettings,
    k: jax.Array | int,
    *,
    config: SpeechLMConfig,
    chunk: int = CHUNK,
    rules: Rules = DEFAULT_RULES,
) -> GenerationState:
    """Generates up to `k` rows; fewer when every reply has ended or has `max_new_tokens` rows, or the state is full.

    Args:
        params, config, rules: those of the prefill.
        state: donated.
        k: int32 [].
        chunk: columns that pass a branch per call of it when it has missed several.
    """
    model = LayerSplitModel(config)
    first = state.step

    def continues(state: GenerationState) -> jax.Array:
        has_space = (state.step < settings.max_new_tokens) & (state.filled < state.capacity)
        return (state.step - first < k) & has_space & state.running.any()

    def step(state: GenerationState) -> GenerationState:
        return _step(model, params, state, settings, min(chunk, state.capacity), rules)

    return jax.lax.while_loop(continues, step, state)


def _step(
    model: LayerSplitModel,
    params: Any,
    state: GenerationState,
    settings: GenerationSettings,
    chunk: int,
    rules: Rules,
) -> GenerationState:
    """One more row: the last column passes the shared block and the active branches, and a new column is appended."""
    config = model.config
    apply: Callable[..., Any] = functools.partial(model.apply, {"params": params})
    last_row = jax.lax.dynamic_index_in_dim(state.grid, state.filled - 1, 1, keepdims=False)
    mode = rules.next_mode(state.mode, last_row[:, 0], last_row[:, 1], config)
    run = functools.partial(_run_columns, model, params, state, positions_of(state.valid))
    _, hidden, cache = run("shared", state.filled - 1, state.caches["shared"], 1)
    state = dataclasses.replace(
        state,
        hidden=jax.lax.dynamic_update_slice_in_dim(state.hidden, hidden, state.filled - 1, 1),
        caches=state.caches | {"shared": cache},
        done=state.done | {"shared": state.filled},
    )
    step = state.step + 1
    forbidden = {
        "text": rules.forbid_text(settings.text_size, config),
        "audio": sampling.forbid_audio(step, settings.min_new_tokens, config),
    }
    active = {name: state.running & rows for name, rows in rules.active_channels(mode).items()}
    drawn = {}
    logits = {}
    done = dict(state.done)
    caches = dict(state.caches)
    for branch, channel in BRANCHES.items():
        channel_settings = getattr(settings, branch)

        def sample(
            y: jax.Array,
            branch: str = branch,
            channel: int = channel,
            settings: ChannelSettings = channel_settings,
        ) -> tuple[jax.Array, jax.Array]:
            logits = apply(branch, y, method="logits")[:, 0]
            scores = sampling.penalise(logits, state.seen[branch], forbidden[branch], settings.repetition_penalty)
            return logits, sampling.draw(scores, sampling.draw_keys(state.keys, step, channel), settings)

        done[branch], caches[branch], logits[branch], drawn[branch] = _run_branch(
            model, params, state, branch, active[branch].any(), chunk, sample
        )

    speaks = mode == AUDIO
    running = state.running
    text = jnp.where(speaks, config.modality_pad_id, drawn["text"])
    audio = jnp.where(active["audio"], drawn["audio"], config.audio_pad_id)
    row = jnp.stack([jnp.where(running, text, config.endoftext_id), jnp.where(running, audio, config.audio_pad_id)], -1)
    stop = jnp.where(running, stop_reason(text, config), state.stop)
    at = (0, state.filled)
    return dataclasses.replace(
        state,
        grid=jax.lax.dynamic_update_slice(state.grid, row[:, None].astype(jnp.int32), (*at, 0)),
        valid=jax.lax.dynamic_update_slice(state.valid, running[:, None], at),
        modes=jax.lax.dynamic_update_slice(state.modes, mode[:, None].astype(jnp.int8), at),
        filled=state.filled + 1,
        caches=caches,
        done=done,
        seen={
            "text": sampling.mark_seen(state.seen["text"], text, active["text"]),
            "audio": sampling.mark_seen(state.seen["audio"], audio, active["audio"]),
        },
        mode=mode.astype(jnp.int32),
        step=step,
        running=running & (stop == RUNNING),
        stop=stop.astype(jnp.int32),
        lengths=state.lengths + running,
        logits=logits,
    )


def _run_branch(
    model: LayerSplitModel,
    params: Any,
    state: GenerationState,
    branch: str,
    active: jax.Array,
    chunk: int,
    sample: _Sample,
) -> tuple[jax.Array, KVCache, jax.Array, jax.Array]:
    """If `active` (bool []), runs all columns that have not passed the branch, and samples from the last one.

    The columns before the last one pass in chunks. These are loops of at most a few rounds, not conditionals, because
    the buffers of a loop are updated in place.

    Returns:
        (columns done int32 [], cache, logits [B, V], ids [B]); logits and ids are zero unless `active`.
    """
    last = state.filled - 1
    run = functools.partial(_run_columns, model, params, state, positions_of(state.valid), branch)

    def catch_up(carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        done, cache = carry
        start, _, cache = run(done, cache, chunk)
        return jnp.minimum(start + chunk, last), cache

    def run_last(
        carry: tuple[jax.Array, KVCache, jax.Array, jax.Array],
    ) -> tuple[jax.Array, KVCache, jax.Array, jax.Array]:
        done, cache, _, _ = carry
        _, y, cache = run(done, cache, 1)
        return last + 1, cache, *sample(y)

    carry = (state.done[branch], state.caches[branch])
    done, cache = jax.lax.while_loop(lambda carry: active & (carry[0] < last), catch_up, carry)
    empty = (jnp.zeros_like(state.logits[branch]), jnp.zeros_like(state.lengths))
    return jax.lax.while_loop(lambda carry: active & (carry[0] <= last), run_last, (done, cache, *empty))


def _run_columns(
    model: LayerSplitModel,
    params: Any,
    state: GenerationState,
    positions: jax.Array,
    block: str,
    done: jax.Array,
    cache: KVCache,
    width: int,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Runs `width` columns from `done` on through a block. Returns (first column, y [B, width, D], cache)."""
    apply: Callable[..., Any] = functools.partial(model.apply, {"params": params})
    # A slice must not reach beyond the end. Starting earlier repeats columns, which changes nothing.
    start = jnp.minimum(done, state.capacity - width)
    if block == "shared":
        x = apply(_columns(state.grid, start, width), method="embed")
    else:
        x = _columns(state.hidden, start, width)
    y, cache = apply(
        block,
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

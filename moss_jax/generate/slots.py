"""The state of a batch of conversations: the grid, the caches, and what sampling needs. It has a fixed capacity.

The rows of a batch share their columns: row b has a real value in column t where `valid[b, t]`. Prompts are padded on
the left, and a row whose reply has ended is padded on the right while the others continue.

Dimension letters: B batch, S columns of capacity, D embed, V vocabulary.
"""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moss_jax.generate.sampling import request_keys
from moss_jax.generate.state_machine import AUDIO, TEXT
from moss_jax.speech_lm import KVCache, SpeechLMConfig, init_cache

A = TypeVar("A", jax.Array, np.ndarray)

BRANCHES = {"text": TEXT, "audio": AUDIO}
MIN_CAPACITY = 256  # columns; capacities are powers of two from here, so that few of them are compiled


@struct.dataclass
class GenerationState:
    """The state between two calls of the loop. Columns from `filled` on are unused.

    `shared` below is the block of layers before the branches.
    """

    grid: jax.Array  # int32 [B, S, 2]
    valid: jax.Array  # bool [B, S]
    modes: jax.Array  # int8 [B, S], the mode in which a generated row was sampled
    filled: jax.Array  # int32 [], number of used columns; the last one has not passed any block yet
    hidden: jax.Array  # [B, S, D], output of the shared block
    caches: dict[str, KVCache]  # of "shared", "text", "audio"
    done: dict[str, jax.Array]  # int32 [] each, number of columns that have passed the block
    seen: dict[str, jax.Array]  # bool [B, V] each, ids of a channel that the repetition penalty counts
    keys: jax.Array  # PRNG keys [B], one per request
    mode: jax.Array  # int32 [B], in which the last row was sampled
    step: jax.Array  # int32 [], number of rows of the current reply
    running: jax.Array  # bool [B], whether the reply of a row continues
    stop: jax.Array  # int32 [B], stop reason of each row; RUNNING also when the reply was cut off
    lengths: jax.Array  # int32 [B], number of rows of each current reply
    logits: dict[str, jax.Array]  # float32 [B, V] each, of the latest step; zero where a branch did not run

    @property
    def capacity(self) -> int:
        return self.grid.shape[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def new_state(config: SpeechLMConfig, batch: int, capacity: int) -> GenerationState:
    """The state of `batch` empty conversations with `capacity` columns."""
    vocab = {"text": config.text_vocab_size, "audio": config.audio_vocab_size}

    def zeros(*shape: int, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.Array:
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
        keys=request_keys(0, batch),
        mode=zeros(batch),
        step=zeros(),
        running=zeros(batch, dtype=bool),
        stop=zeros(batch),
        lengths=zeros(batch),
        logits={name: zeros(batch, size, dtype=jnp.float32) for name, size in vocab.items()},
    )


@functools.partial(jax.jit, donate_argnames="state")
def cleared(state: GenerationState) -> GenerationState:
    """Empty conversations in the same buffers (`state` is donated)."""
    zero = jnp.zeros((), jnp.int32)
    return dataclasses.replace(
        state,
        valid=jnp.zeros_like(state.valid),
        filled=zero,
        done={name: zero for name in state.done},
        seen=jax.tree.map(jnp.zeros_like, state.seen),
    )


def with_capacity(state: GenerationState, capacity: int) -> GenerationState:
    """The same conversations with more or fewer columns, at least `filled`. Leaves are numpy or jax arrays."""

    def resized(leaf: Any, axis: int) -> Any:
        leaf = leaf[(slice(None),) * axis + (slice(capacity),)]
        padding = [(0, capacity - leaf.shape[axis] if i == axis else 0) for i in range(leaf.ndim)]
        return np.pad(leaf, padding) if isinstance(leaf, np.ndarray) else jnp.pad(leaf, padding)

    return dataclasses.replace(
        state,
        grid=resized(state.grid, 1),
        valid=resized(state.valid, 1),
        modes=resized(state.modes, 1),
        hidden=resized(state.hidden, 1),
        caches={name: KVCache(resized(cache.k, 2), resized(cache.v, 2)) for name, cache in state.caches.items()},
    )


def capacity_for(columns: int, context: int) -> int:
    """The capacity that is compiled for this number of columns: a power of two, at most `context`."""
    return min(max(MIN_CAPACITY, 1 << (columns - 1).bit_length()), context)


def positions_of(valid: A) -> A:
    """Positions int [B, S] of the columns of a mask bool [B, S]: real columns count from 0, padding has 1."""
    counted: A = valid.cumsum(-1) - 1
    positions: A = counted * valid + ~valid
    return positions

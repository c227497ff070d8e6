"""From logits to one id per row and channel: masks, repetition penalty, temperature, top-k, top-p, the random draw.

Each draw has a key of its own, derived from (seed, request, step, channel). So a request gets the same draws alone and
in a batch, and a channel that is not sampled in some step changes no other draw.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moss_jax.generate.settings import DEFAULTS
from moss_jax.nn.layers import over_last_axes
from moss_jax.speech_lm import SpeechLMConfig


@struct.dataclass
class ChannelSettings:
    """How one channel is sampled. The defaults are those of the released driver.

    `top_k` (0 is off) and `greedy` are compiled in; the other three may change without a new compilation.
    """

    temperature: float = DEFAULTS["temperature"]
    top_p: float = DEFAULTS["top_p"]
    repetition_penalty: float = DEFAULTS["repetition_penalty"]
    top_k: int = struct.field(pytree_node=False, default=DEFAULTS["top_k"])
    greedy: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class GenerationSettings:
    """How a reply is generated. The defaults are those of the released driver. `top_k` and `greedy` of the channels are
    compiled in; everything else may change without a new compilation."""

    text: ChannelSettings = ChannelSettings()
    audio: ChannelSettings = ChannelSettings()
    max_new_tokens: int = DEFAULTS["max_new_tokens"]  # rows of a reply, its last row included
    min_new_tokens: int = DEFAULTS["min_new_tokens"]  # speech cannot end before this row of the reply
    text_size: int = 2**31 - 1  # text ids from here on have no token and are never sampled


def forbid_audio(step: jax.Array | int, min_new_tokens: jax.Array | int, config: SpeechLMConfig) -> jax.Array:
    """The audio ids that cannot be sampled: everything above the end of speech (eosp), and eosp itself in early steps.

    Args:
        step: int32 [], the row of the reply, from 1.
        min_new_tokens: int32 [], the first step in which eosp may be sampled.

    Returns:
        bool [V], true for a forbidden id.
    """
    ids = jnp.arange(config.audio_vocab_size)
    return (ids > config.eosp_id) | ((ids == config.eosp_id) & (step < min_new_tokens))


def forbid_text(text_size: jax.Array | int, config: SpeechLMConfig) -> jax.Array:
    """The text ids that cannot be sampled: modality_pad, and ids without a token.

    Args:
        text_size: int32 [], number of ids in the text tokenizer; the vocabulary is padded beyond it.

    Returns:
        bool [V], true for a forbidden id.
    """
    ids = jnp.arange(config.text_vocab_size)
    return (ids == config.modality_pad_id) | (ids >= text_size)


def penalise(logits: jax.Array, seen: jax.Array, forbidden: jax.Array | bool, penalty: jax.Array | float) -> jax.Array:
    """Masks forbidden ids and applies the repetition penalty.

    Args:
        logits: [B, V], any floating-point dtype.
        seen: bool [B, V], ids that the penalty makes less likely.
        forbidden: bool [V] or [B, V].
        penalty: positive scores are divided by it, negative ones multiplied.

    Returns:
        Scores float32 [B, V], -inf where forbidden.
    """
    forbidden = over_last_axes(jnp.asarray(forbidden), logits)
    scores = jnp.where(forbidden, -jnp.inf, logits.astype(jnp.float32))
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


def filter_logits(scores: jax.Array, settings: ChannelSettings) -> jax.Array:
    """Applies temperature, top-k and top-p.

    Top-k keeps every entry equal to the k-th best. Top-p keeps the smallest set of best entries whose probability
    reaches p, at least one; of equal entries the lowest id comes first.

    Args:
        scores: float32 [B, V].

    Returns:
        Logits float32 [B, V] of the distribution to sample from, -inf where an id is filtered out.
    """
    logits = scores / settings.temperature
    size = logits.shape[-1]
    if 0 < settings.top_k < size:
        best = jax.lax.top_k(logits, settings.top_k)[0]
        logits = jnp.where(logits < best[..., -1:], -jnp.inf, logits)
    else:
        best = -jnp.sort(-logits, -1)
    # The probability of everything before the i-th best entry; the last entry that starts below p ends the set.
    total = jax.nn.logsumexp(logits, -1, keepdims=True)
    mass = jnp.exp(best - total)
    before = jnp.cumsum(mass, -1) - mass
    inside = (before < settings.top_p).at[..., 0].set(True)
    edge = jnp.take_along_axis(best, inside.sum(-1, keepdims=True) - 1, -1)
    # Several entries may equal the last one of the set. Those that start below p are kept, in the order of their ids.
    above = jnp.where(best > edge, mass, 0).sum(-1, keepdims=True)
    equal = logits == edge
    nth_equal = jnp.cumsum(equal, -1) - 1
    kept = (logits > edge) | (equal & ((nth_equal == 0) | (above + nth_equal * jnp.exp(edge - total) < settings.top_p)))
    return jnp.where(kept | (settings.top_p >= 1), logits, -jnp.inf)


def draw(scores: jax.Array, keys: jax.Array, settings: ChannelSettings) -> jax.Array:
    """Samples one id per row; greedy takes the best one, of equal ones the lowest id.

    Args:
        scores: float32 [B, V].
        keys: PRNG keys [B].

    Returns:
        int32 [B].
    """
    if settings.greedy:
        return scores.argmax(-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(scores, settings)).astype(jnp.int32)


def request_keys(seed: int, requests: jax.Array | np.ndarray | int) -> jax.Array:
    """PRNG keys [B] of the requests int32 [B] (or of requests 0 to `requests` - 1) under one seed."""
    requests = jnp.arange(requests) if isinstance(requests, int) else requests
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), requests)


def draw_keys(keys: jax.Array, step: jax.Array, channel: int) -> jax.Array:
    """PRNG keys [B] of one draw, from the requests' keys [B], the step (int32 []) and the channel (0 text, 1 audio)."""
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, step), channel))(keys)


def seen_ids(ids: jax.Array, counts: jax.Array, size: int) -> jax.Array:
    """Which of `size` ids occur: bool [B, V], from ids int32 [B, S] where `counts` (bool [B, S]) holds."""
    rows = jnp.arange(ids.shape[0])[:, None]
    # The id `size` is out of bounds, and mode="drop" leaves it out.
    return jnp.zeros((ids.shape[0], size), bool).at[rows, jnp.where(counts, ids, size)].set(True, mode="drop")


def mark_seen(seen: jax.Array, ids: jax.Array, counts: jax.Array) -> jax.Array:
    """`seen` (bool [B, V]) with the ids int32 [B] added where `counts` (bool [B]) holds."""
    return seen.at[jnp.arange(ids.shape[0]), jnp.where(counts, ids, seen.shape[-1])].set(True, mode="drop")

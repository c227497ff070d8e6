"""From logits to one id per row and channel: masks, repetition penalty, temperature, top-k, top-p, the draw.

Draws are keyed by (request, step, channel): skipping one never moves another, and a row of a batch draws what it would
draw alone.
"""

import jax
import jax.numpy as jnp
from flax import struct

from moss_jax.generate.settings import DEFAULTS


@struct.dataclass
class ChannelSettings:
    """How one channel is sampled. The defaults are those of the released driver.

    `top_k` (0 is off) and `greedy` are compiled in; the other three are numbers that may change without a new compile.
    """

    temperature: float = DEFAULTS["temperature"]
    top_p: float = DEFAULTS["top_p"]
    repetition_penalty: float = DEFAULTS["repetition_penalty"]
    top_k: int = struct.field(pytree_node=False, default=DEFAULTS["top_k"])
    greedy: bool = struct.field(pytree_node=False, default=False)


def forbid_audio(step: jax.Array, min_new_tokens: jax.Array, config) -> jax.Array:
    """Audio ids that may not be drawn in step `step` (int32 [], from 1): bool [V]. Nothing above eosp ever may, eosp
    not before step `min_new_tokens`."""
    ids = jnp.arange(config.audio_vocab_size)
    return (ids > config.eosp_id) | ((ids == config.eosp_id) & (step < min_new_tokens))


def forbid_text(text_size: jax.Array | int, config) -> jax.Array:
    """Text ids that may not be drawn under the default rules: bool [V]. modality_pad, and from `text_size` on, where
    the text tokenizer has no tokens. (The reference forbids none.)"""
    ids = jnp.arange(config.text_vocab_size)
    return (ids == config.modality_pad_id) | (ids >= text_size)


def penalise(logits: jax.Array, seen: jax.Array, forbidden: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Logits [B, V] -> scores float32 [B, V]: -inf where forbidden, ids in `seen` (bool [B, V]) made less likely."""
    scores = jnp.where(forbidden, -jnp.inf, logits.astype(jnp.float32))
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


def filter_logits(scores: jax.Array, settings: ChannelSettings) -> jax.Array:
    """Scores [B, V] -> logits [B, V] of the distribution to draw from: temperature, then top-k (every entry equal to
    the k-th stays), then top-p (the smallest set whose mass reaches p, at least one; of equal entries the lowest id
    first)."""
    logits = scores / settings.temperature
    size = logits.shape[-1]
    if 0 < settings.top_k < size:
        best = jax.lax.top_k(logits, settings.top_k)[0]
        logits = jnp.where(logits < best[..., -1:], -jnp.inf, logits)
    else:
        best = -jnp.sort(-logits, -1)
    # Mass of everything before the i-th best entry; the last entry that still starts below p is where the set ends.
    total = jax.nn.logsumexp(logits, -1, keepdims=True)
    mass = jnp.exp(best - total)
    before = jnp.cumsum(mass, -1) - mass
    inside = (before < settings.top_p).at[..., 0].set(True)
    edge = jnp.take_along_axis(best, inside.sum(-1, keepdims=True) - 1, -1)
    above = jnp.where(best > edge, mass, 0).sum(-1, keepdims=True)
    equal = logits == edge
    nth_equal = jnp.cumsum(equal, -1) - 1
    kept = (logits > edge) | (equal & ((nth_equal == 0) | (above + nth_equal * jnp.exp(edge - total) < settings.top_p)))
    return jnp.where(kept | (settings.top_p >= 1), logits, -jnp.inf)


def draw(scores: jax.Array, keys: jax.Array, settings: ChannelSettings) -> jax.Array:
    """Scores [B, V] and one key per row [B] -> ids int32 [B]. Greedy takes the lowest id among equals."""
    if settings.greedy:
        return scores.argmax(-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(scores, settings)).astype(jnp.int32)


def request_keys(seed: int, requests: jax.Array | int) -> jax.Array:
    """Keys [B] of the requests int32 [B] (or of the first `requests` ones) under one seed."""
    requests = jnp.arange(requests) if isinstance(requests, int) else requests
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), requests)


def draw_keys(keys: jax.Array, step: jax.Array, channel: int) -> jax.Array:
    """Keys [B] of the draw in step `step` (int32 []) and `channel` (0 text, 1 audio) from the requests' keys [B]."""
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, step), channel))(keys)


def seen_ids(ids: jax.Array, counts: jax.Array, size: int) -> jax.Array:
    """Presence bitmap bool [B, V] of the ids [B, S] where `counts` (bool [B, S]) holds."""
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], size), bool).at[rows, jnp.where(counts, ids, size)].set(True, mode="drop")


def mark_seen(seen: jax.Array, ids: jax.Array, counts: jax.Array) -> jax.Array:
    """`seen` [B, V] with the ids [B] added where `counts` (bool [B]) holds."""
    return seen.at[jnp.arange(ids.shape[0]), jnp.where(counts, ids, seen.shape[-1])].set(True, mode="drop")

"""The rules of a reply: which channel a row is sampled from, which table embeds a row, and when a reply ends.

Every function works elementwise on arrays of any shape, numpy or jax. A mode is TEXT or AUDIO: the channel that a row
is sampled from.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.generate.sampling import forbid_text
from moss_jax.speech_lm import SpeechLMConfig

Array = jax.Array | np.ndarray

# modes
TEXT = 0
AUDIO = 1

# Stop reasons. A reply that is cut off by its maximum length keeps RUNNING.
RUNNING = 0
IM_END = 1
ENDOFTEXT = 2


def embeds_audio(text: Array, config: SpeechLMConfig) -> Array:
    """Whether a row with this text id is embedded from the audio table."""
    return text == config.modality_pad_id


def initial_mode(text: Array, audio: Array, config: SpeechLMConfig) -> jax.Array:
    """The mode of the last prompt row (text, audio); `next_mode` of it is the mode of the first generated row."""
    return jnp.where(embeds_audio(text, config), AUDIO, TEXT)


def next_mode(mode: Array, text: Array, audio: Array, config: SpeechLMConfig) -> jax.Array:
    """The mode after a row (text, audio) that was sampled in `mode`."""
    opens = (mode == TEXT) & (text == config.sosp_id)
    closes = (mode == AUDIO) & (audio == config.eosp_id)
    return jnp.where(closes, TEXT, jnp.where(opens, AUDIO, mode))


def active_channels(mode: Array) -> dict[str, Array]:
    """For each channel, whether a row of this mode has a value there. Only these values are computed, written to the
    grid and counted by the repetition penalty."""
    return {"text": mode == TEXT, "audio": mode == AUDIO}


def stop_reason(text: Array, config: SpeechLMConfig) -> jax.Array:
    """IM_END, ENDOFTEXT or RUNNING for the text id of a generated row."""
    return jnp.where(text == config.im_end_id, IM_END, jnp.where(text == config.endoftext_id, ENDOFTEXT, RUNNING))


@dataclass(frozen=True)
class Rules:
    """The rules that the generation loop follows: a static argument of the compiled functions.

    DEFAULT_RULES are the functions of this module. A comparison with another implementation replaces some of them.
    """

    initial_mode: Callable[[Array, Array, SpeechLMConfig], jax.Array]
    next_mode: Callable[[Array, Array, Array, SpeechLMConfig], jax.Array]
    active_channels: Callable[[Array], dict[str, Array]]
    forbid_text: Callable[[jax.Array | int, SpeechLMConfig], jax.Array]


DEFAULT_RULES = Rules(initial_mode, next_mode, active_channels, forbid_text)

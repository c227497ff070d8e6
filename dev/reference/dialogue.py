"""The dialogue of the released programs (fnlp/MOSS-Speech): its processor's prompts and its generation rules.

Differences from the product:

| released | product |
|---|---|
| the processor's system turn after all turns where there is none | the driver's system turn, first |
| special strings in what a person wrote are special tokens | plain text |
| a row (sosp, eosp) opens and closes speech at once | eosp counts only on rows that were sampled in audio mode |
| a prompt that ends in the code `audio_pad` counts as text | modality_pad alone decides |
| text mode may sample modality_pad and ids without a token | never |
| the repetition penalty counts both channels of every row | only values that a row has, see `active_channels` |
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moss_jax.dialogue.turns import Turn
from moss_jax.generate import state_machine
from moss_jax.generate.state_machine import AUDIO, TEXT, Array, Rules
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.text.tokenizer import TextTokenizer

# What the processor inserts. The released driver always gives a system turn, so its users never meet these.
PROCESSOR_SYSTEM_PROMPT = {
    "speech": "You are a helpful assistant. Respond with spoken outputs.",
    "text": "You are a helpful assistant. Respond with text outputs.",
}


class ProcessorTokenizer(TextTokenizer):
    """Text <-> ids as in the released processor: special strings in what a person wrote are special tokens."""

    def encode(self, text: str) -> list[int]:
        return self.encode_template(text)


def with_processor_system(turns: Sequence[Turn], reply: str) -> list[Turn]:
    """The turns of a new conversation as the released processor has them, its system turn last."""
    if turns and turns[0].role == "system":
        return list(turns)
    return [*turns, Turn("system", text=PROCESSOR_SYSTEM_PROMPT[reply])]


def initial_mode(text: Array, audio: Array, config: SpeechLMConfig) -> jax.Array:
    is_speech = state_machine.embeds_audio(text, config) & (audio != config.audio_pad_id)
    return jnp.where(is_speech, AUDIO, TEXT)


def next_mode(mode: Array, text: Array, audio: Array, config: SpeechLMConfig) -> jax.Array:
    opens = (mode == TEXT) & (text == config.sosp_id)
    closes = ((mode == AUDIO) | opens) & (audio == config.eosp_id)
    return jnp.where(closes, TEXT, jnp.where(opens, AUDIO, mode))


def active_channels(mode: Array) -> dict[str, Array]:
    everywhere = jnp.ones(mode.shape, bool)
    return {"text": everywhere, "audio": everywhere}


def forbid_text(text_size: jax.Array | int, config: SpeechLMConfig) -> jax.Array:
    return jnp.zeros(config.text_vocab_size, bool)


RULES = Rules(
    initial_mode=initial_mode,
    next_mode=next_mode,
    active_channels=active_channels,
    forbid_text=forbid_text,
)

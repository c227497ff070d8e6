"""The rules that drive generation: which channel speaks next, from which table a row is embedded, when a reply ends.

Everything works elementwise on arrays of any shape, numpy or jax. A mode is 0 (text) or 1 (audio). `compat` gives the
rules of the reference; the default differs in two places, where the reference opens and closes speech on one row and
where a prompt that ends in the code `audio_pad` is taken for text.
"""

import jax.numpy as jnp

TEXT = 0
AUDIO = 1
# stop reasons; a reply that is cut by its length never leaves RUNNING
RUNNING = 0
IM_END = 1
ENDOFTEXT = 2


def initial_mode(text, audio, config, compat: bool = False):
    """The mode that the last prompt row (text, audio) leaves behind, before `next_mode` is applied to that row."""
    spoken = embeds_audio(text, config)
    if compat:
        spoken &= audio != config.audio_pad_id
    return jnp.where(spoken, AUDIO, TEXT)


def next_mode(mode, text, audio, config, compat: bool = False):
    """The mode after a row (text, audio) that was sampled in `mode`."""
    opened = (mode == TEXT) & (text == config.sosp_id)
    speaking = (mode == AUDIO) | (opened if compat else False)
    closed = speaking & (audio == config.eosp_id)
    return jnp.where(closed, TEXT, jnp.where(opened, AUDIO, mode))


def embeds_audio(text, config):
    """Whether a row is embedded from the audio table."""
    return text == config.modality_pad_id


def stop_reason(text, config):
    """IM_END, ENDOFTEXT or RUNNING for the text value of a generated row."""
    return jnp.where(text == config.im_end_id, IM_END, jnp.where(text == config.endoftext_id, ENDOFTEXT, RUNNING))

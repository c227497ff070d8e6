"""The language model as a component of a system."""

from collections.abc import Callable, Mapping
from functools import partial

from moss_jax.checkpoint.component import MODEL_FILE, Component, Shapes
from moss_jax.speech_lm.config import SpeechLMConfig
from moss_jax.speech_lm.model import model_axes, model_shapes


def _files(config: SpeechLMConfig) -> Mapping[str, Callable[[], Shapes]]:
    return {MODEL_FILE: partial(model_shapes, config)}


def _code_count(config: SpeechLMConfig) -> int | None:
    # The codes are the audio ids below the end of speech. Without an audio branch the model has none.
    return config.eosp_id if config.audio_vocab_size else None


SPEECH_LM = Component(
    name="transformer",
    title="language model",
    config_type=SpeechLMConfig,
    files=_files,
    code_count=_code_count,
    axes=model_axes,
)

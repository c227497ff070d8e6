"""The speech tokenizer as a component of a system."""

from collections.abc import Callable, Mapping
from functools import partial

from moss_jax.checkpoint.component import MODEL_FILE, Component, Shapes
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import encoder_shapes


def _files(config: SpeechTokenizerConfig) -> Mapping[str, Callable[[], Shapes]]:
    return {MODEL_FILE: partial(encoder_shapes, config)}


def _code_count(config: SpeechTokenizerConfig) -> int:
    return config.quantize_vocab_size


SPEECH_TOKENIZER = Component(
    name="speech_tokenizer",
    title="speech tokenizer",
    config_type=SpeechTokenizerConfig,
    files=_files,
    code_count=_code_count,
    dtype="float32",  # the dtype of the computation; the file may have fewer bits
)

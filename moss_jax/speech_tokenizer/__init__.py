"""Speech -> codes: a causal Whisper encoder with a vector quantiser, whole clips or as a stream.

    from moss_jax.speech_tokenizer import SpeechTokenizer

    speech_tokenizer = SpeechTokenizer.load("FOLDER/speech_tokenizer")
    (codes,) = speech_tokenizer.encode([wave])  # float32 [samples] at 16 kHz -> int32 [codes]

docs/speech_tokenizer.md describes it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
    from moss_jax.speech_tokenizer.encode import SpeechTokenizer
    from moss_jax.speech_tokenizer.stream import LogMelStream, WaveStream

__all__ = ["LogMelStream", "SpeechTokenizer", "SpeechTokenizerConfig", "WaveStream"]

PUBLIC = {
    "LogMelStream": "stream",
    "SpeechTokenizer": "encode",
    "SpeechTokenizerConfig": "config",
    "WaveStream": "stream",
}


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(f"moss_jax.speech_tokenizer.{PUBLIC[name]}"), name)
    raise AttributeError(f"module 'moss_jax.speech_tokenizer' has no attribute {name!r}")

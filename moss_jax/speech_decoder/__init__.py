"""Speech codes -> waveform: a flow-matching decoder makes a log-mel, a HiFT vocoder makes the waveform.

    from moss_jax.speech_decoder import Voice

    decoder = moss_jax.load("FOLDER").speech_decoder  # a SpeechDecoder
    wave = decoder.decode(codes, Voice.zero())        # float32 [samples] at 24 kHz

docs/speech_decoder.md describes it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jax.speech_decoder.codes import read_codes
    from moss_jax.speech_decoder.config import SpeechDecoderConfig
    from moss_jax.speech_decoder.decoder import SpeechDecoder
    from moss_jax.speech_decoder.speaker import speaker_embedding
    from moss_jax.speech_decoder.voice import Voice

__all__ = ["SpeechDecoder", "SpeechDecoderConfig", "Voice", "read_codes", "speaker_embedding"]

PUBLIC = {
    "SpeechDecoder": "decoder",
    "SpeechDecoderConfig": "config",
    "Voice": "voice",
    "read_codes": "codes",
    "speaker_embedding": "speaker",
}


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(f"moss_jax.speech_decoder.{PUBLIC[name]}"), name)
    raise AttributeError(f"module 'moss_jax.speech_decoder' has no attribute {name!r}")

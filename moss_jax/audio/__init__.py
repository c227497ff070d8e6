"""Waveforms and acoustic features. Knows no model."""

from moss_jax.audio.decode import load_audio, read_audio
from moss_jax.audio.pcm import from_pcm16, to_pcm16
from moss_jax.audio.recording import MAX_BYTES, Recording, as_recording
from moss_jax.audio.resample import resample
from moss_jax.audio.speech import check_speech
from moss_jax.audio.wave import save_audio, segments

__all__ = [
    "MAX_BYTES",
    "Recording",
    "as_recording",
    "check_speech",
    "from_pcm16",
    "load_audio",
    "read_audio",
    "resample",
    "save_audio",
    "segments",
    "to_pcm16",
]

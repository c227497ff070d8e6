"""Waveforms and acoustic features. Knows no model."""

from moss_jax.audio.wave import load_audio, resample, save_audio, segments

__all__ = ["load_audio", "resample", "save_audio", "segments"]

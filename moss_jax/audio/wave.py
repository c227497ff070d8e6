"""Waves on their way out, and the names of this package under one module.

A wave is float32 [samples], mono; full scale is 1.
"""

import io
import os
from pathlib import Path

import numpy as np

from moss_jax.audio.decode import load_audio
from moss_jax.audio.pcm import to_pcm16
from moss_jax.audio.resample import resample
from moss_jax.errors import MossError
from moss_jax.files import atomic_file

__all__ = ["WRITABLE", "load_audio", "resample", "save_audio", "segments"]

WRITABLE = {".wav": "WAV", ".flac": "FLAC"}


def save_audio(path: str | os.PathLike, wave: np.ndarray, rate: int) -> None:
    """Writes a wave as 16-bit wav or flac, by the ending of `path`: whole, or not at all.

    Args:
        wave: float [samples]; what exceeds [-1, 1] is clipped.
        rate: samples per second, Hz.

    Raises:
        MossError: the ending is another one, the wave holds NaN or infinite samples, or the file cannot be written.
    """
    import soundfile

    path = Path(path)
    wave = np.asarray(wave, np.float32)
    if path.suffix.lower() not in WRITABLE:
        raise MossError(f"{path}: cannot write {path.suffix or 'a file without an ending'}, expected .wav or .flac")
    if not np.isfinite(wave).all():
        raise MossError(f"{path}: not written, the wave holds NaN or infinite samples")
    content = io.BytesIO()
    with atomic_file(path) as part:
        try:
            soundfile.write(content, to_pcm16(wave), rate, format=WRITABLE[path.suffix.lower()], subtype="PCM_16")
        except soundfile.SoundFileError as error:
            raise MossError(f"{path}: cannot be written ({error})") from error
        part.write_bytes(content.getbuffer())


def segments(wave: np.ndarray, samples: int) -> list[np.ndarray]:
    """Consecutive pieces of `samples` samples, the last one shorter; none when the wave is empty."""
    return [wave[start : start + samples] for start in range(0, len(wave), samples)]

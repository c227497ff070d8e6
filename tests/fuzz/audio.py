"""Damaged recordings of every container that we read: `load_audio`, then `resample` to 16 kHz."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from hypothesis import strategies as st

from moss_jax.audio.wave import load_audio, resample
from tests.fuzz.edits import edited, edits

# name: (libsndfile's format and subtype, rate in Hz, channels)
SNDFILE = {
    "wav": ("WAV", "PCM_16", 16000, 1),
    "wav-float": ("WAV", "FLOAT", 44100, 2),
    "wav-24": ("WAVEX", "PCM_24", 48000, 6),
    "wav-u8": ("WAV", "PCM_U8", 8000, 1),
    "wav-adpcm": ("WAV", "IMA_ADPCM", 22050, 1),
    "rf64": ("RF64", "PCM_16", 16000, 1),
    "w64": ("W64", "PCM_16", 16000, 2),
    "aiff": ("AIFF", "PCM_16", 16000, 1),
    "flac": ("FLAC", "PCM_16", 16000, 2),
    "mp3": ("MP3", "MPEG_LAYER_III", 24000, 1),
    "vorbis": ("OGG", "VORBIS", 16000, 1),
    "opus": ("OGG", "OPUS", 48000, 1),
    "au": ("AU", "PCM_16", 16000, 1),
    "caf": ("CAF", "PCM_16", 16000, 1),
}
# name: (PyAV's container and codec, rate in Hz)
LIBAV = {"m4a": ("mp4", "aac", 16000), "webm": ("webm", "libopus", 48000), "mkv": ("matroska", "pcm_s16le", 16000)}
SEEDS = (*SNDFILE, *LIBAV)
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".webm", ".aiff", "")
SECONDS = 0.3

CASES = st.fixed_dictionaries({
    "seed": st.sampled_from(SEEDS),
    "other": st.sampled_from(SEEDS),
    "edits": edits(),
    "suffix": st.sampled_from(SUFFIXES),
})  # fmt: skip


def run(case: dict, folder: Path) -> None:
    path = folder / f"recording{case['suffix']}"
    path.write_bytes(edited(recording(case["seed"]), case["edits"], recording(case["other"])))
    wave, rate = load_audio(path)
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    assert wave.size > 0
    assert np.isfinite(wave).all()
    assert isinstance(rate, int)
    at_16k = resample(wave, rate, 16000)
    assert at_16k.dtype == np.float32
    assert np.isfinite(at_16k).all()


@cache
def recording(name: str) -> bytes:
    """A recording of SECONDS seconds, a tone with noise, in one of SEEDS."""
    if name in LIBAV:
        return _with_libav(*LIBAV[name])
    container, subtype, rate, channels = SNDFILE[name]
    buffer = io.BytesIO()
    wave = np.repeat(_wave(rate)[:, None], channels, 1)
    soundfile.write(buffer, wave, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def _wave(rate: int) -> np.ndarray:
    time = np.arange(int(SECONDS * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.01, len(time))
    return (0.3 * np.sin(2 * np.pi * 440 * time) + noise).astype(np.float32)


def _with_libav(container: str, codec: str, rate: int) -> bytes:
    import av

    buffer = io.BytesIO()
    samples = (_wave(rate)[None] * 32767).astype(np.int16)
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = rate
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()

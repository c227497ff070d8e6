"""Damaged recordings of every supported container, and arrays of every dtype; then `resample` to 16 kHz."""

import io
import struct
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from hypothesis import strategies as st

from moss_jax.audio.recording import as_recording
from moss_jax.audio.wave import load_audio, resample
from tests.fuzz.documents import SCALARS
from tests.fuzz.edits import NUMBERS, edited, edits

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


def _around(*usual: int) -> st.SearchStrategy[int]:
    """One of the usual numbers, or any other number."""
    return st.one_of(st.sampled_from(usual), st.sampled_from(NUMBERS), st.integers(0, 2**64 - 1))


CASES = st.one_of(
    st.fixed_dictionaries(
        {
            "seed": st.sampled_from(SEEDS),
            "other": st.sampled_from(SEEDS),
            "edits": edits(),
            "suffix": st.sampled_from(SUFFIXES),
        }
    ),
    st.fixed_dictionaries(
        {
            "container": st.sampled_from(["wav", "rf64", "flac"]),
            "suffix": st.sampled_from(SUFFIXES),
            "rate": st.one_of(st.integers(1, 800_000), _around(8000, 16000, 22254, 44101, 655_350)),
            "channels": _around(1, 2, 6, 8),
            "bits": _around(8, 16, 24, 32),
            "coding": _around(1, 3, 6, 7, 17, 0xFFFE),
            "frames": _around(0, 1, 2000, 4000),
            "size": _around(0, 8, 8000),
        }
    ),
    st.fixed_dictionaries(
        {
            "array": st.sampled_from(
                [
                    "float16",
                    "float32",
                    "float64",
                    "int8",
                    "int16",
                    "int32",
                    "int64",
                    "uint8",
                    "uint16",
                    "bool",
                    "complex64",
                    "U3",
                    "object",
                    "M8[s]",
                ]
            ),
            "shape": st.sampled_from(
                [
                    (),
                    (0,),
                    (1,),
                    (1000,),
                    (1000, 2),
                    (2, 1000),
                    (1000, 1),
                    (3, 3),
                    (0, 2),
                    (1000, 0),
                    (400, 1000),
                    (2, 2, 2),
                ]
            ),
            "scale": st.sampled_from([0, 1e-30, 0.5, 1, 2, 127, 32767, 1e38, float("nan"), float("inf")]),
            "rate": st.one_of(SCALARS, st.integers(1, 800_000), st.sampled_from([16000, 48000.0, "48000", 44101])),
        }
    ),
)


def run(case: dict, folder: Path) -> None:
    path = folder / f"recording{case.get('suffix')}"
    if "array" in case:
        recording = as_recording(_array(case), case["rate"])
        _check(recording.wave, recording.rate)
        return
    if "seed" in case:
        path.write_bytes(edited(encoded(case["seed"]), case["edits"], encoded(case["other"])))
    else:
        path.write_bytes(_claimed(case))
    _check(*load_audio(path))


def _check(wave: np.ndarray, rate: int) -> None:
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    assert wave.size > 0
    assert np.isfinite(wave).all()
    assert isinstance(rate, int)
    at_16k = resample(wave, rate, 16000)
    assert at_16k.dtype == np.float32
    assert np.isfinite(at_16k).all()


def _array(case: dict) -> np.ndarray:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        values = np.sin(np.arange(np.prod(case["shape"], dtype=int))) * case["scale"]
        if case["array"] == "M8[s]":
            values = values.astype(np.int64)
        return values.astype(case["array"]).reshape(case["shape"])


def _claimed(case: dict) -> bytes:
    """A file with 8000 bytes of samples whose header claims what the case says."""
    rate = case["rate"] % 2**32
    channels = case["channels"] % 2**16
    bits = case["bits"] % 2**16
    samples = encoded("wav")[44 : 44 + 8000]
    if case["container"] == "flac":
        flac = encoded("flac")
        fields = rate % 2**20 << 44 | channels % 8 << 41 | bits % 32 << 36 | case["frames"] % 2**36
        return flac[:18] + fields.to_bytes(8, "big") + flac[26:]
    block = channels * bits // 8 % 2**16
    form = struct.pack("<HHIIHH", case["coding"] % 2**16, channels, rate, rate * block % 2**32, block, bits)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form
    if case["container"] == "rf64":
        sizes = struct.pack("<QQQI", case["size"], case["size"], case["frames"], 0)
        chunks = b"ds64" + struct.pack("<I", len(sizes)) + sizes + chunks
        return b"RF64" + b"\xff" * 4 + b"WAVE" + chunks + b"data" + b"\xff" * 4 + samples
    size = case["size"] % 2**32
    return b"RIFF" + struct.pack("<I", size) + b"WAVE" + chunks + b"data" + struct.pack("<I", size) + samples


@cache
def encoded(name: str) -> bytes:
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

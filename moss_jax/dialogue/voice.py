"""Voices: enrolled once from a recording, and stored in one small safetensors file."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_jax.audio.features import MEL_24K, MelConfig, mel_24k
from moss_jax.audio.wave import resample
from moss_jax.checkpoint import open_tensors, save_tensors
from moss_jax.errors import MossError
from moss_jax.generate.settings import DEFAULTS
from moss_jax.nn.precision import in_32_bits
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.decoder import check_voice
from moss_jax.speech_decoder.speaker import speaker_embedding
from moss_jax.speech_decoder.voice import Voice
from moss_jax.speech_tokenizer.encode import SpeechTokenizer

FORMAT = "moss-jax-voice-1"


@in_32_bits
def enrol(
    wave: np.ndarray,
    rate: int,
    tokenizer: SpeechTokenizer,
    config: SpeechDecoderConfig,
    speaker_params: Any,
    reply_codes: int = DEFAULTS["max_new_tokens"],
) -> Voice:
    """A voice from a recording of some seconds of clear speech by one person.

    As in the released program, the codes are computed at the speech tokenizer's rate, the mel at the decoder's rate,
    and the speaker embedding at 16 kHz, resampled from the decoder's rate.

    Args:
        wave: float32 [samples], mono, at `rate` Hz.
        tokenizer: the speech tokenizer of the system.
        config: of the speech decoder, which has a speaker network.
        speaker_params: of the speaker network.
        reply_codes: length of a reply that the speech decoder must be able to decode with this voice.

    Raises:
        MossError: the recording is too short or too long, or has NaN or infinite samples.
    """
    assert config.speaker is not None
    _check_length(len(wave), rate, config, reply_codes)
    (codes,) = tokenizer.encode([resample(wave, rate, tokenizer.config.sample_rate)])
    at_decoder = resample(wave, rate, config.sample_rate)
    mel = log_mel(at_decoder, config)
    count = min(len(mel) // config.flow.frames_per_code, len(codes))
    embedding = speaker_embedding(config.speaker, speaker_params, resample(at_decoder, config.sample_rate, 16000))
    return Voice(codes[:count], mel[: count * config.flow.frames_per_code], embedding)


def _check_length(samples: int, rate: int, config: SpeechDecoderConfig, reply_codes: int) -> None:
    """Raises MossError where a recording is shorter than a code, or too long to decode a reply with it."""
    seconds = samples / rate
    shortest = 1 / config.code_rate
    longest = max(config.flow.max_codes - reply_codes, 1) / config.code_rate
    if not shortest <= seconds <= longest:
        problem = "short" if seconds < shortest else "long"
        raise MossError(
            f"a recording of {seconds:.4g} s is too {problem} for a voice, expected {shortest:g} to {longest:g} s"
        )


def log_mel(wave: np.ndarray, config: SpeechDecoderConfig) -> np.ndarray:
    """The log-mel float32 [T, M] of a wave float32 [samples] at the decoder's rate. Few lengths are compiled.

    Raises:
        MossError: the wave is too short.
    """
    hop = config.vocoder.hop
    sizes = replace(
        MEL_24K, sample_rate=config.sample_rate, hop_length=hop, n_fft=4 * hop, num_mel_bins=config.flow.mel_bins
    )
    if len(wave) < sizes.n_fft:
        raise MossError(f"a wave of {len(wave)} samples is too short for a mel, expected at least {sizes.n_fft}")
    bucket = 2 * config.sample_rate  # compiled lengths: 2 s, 4 s, 8 s, ...
    while bucket < len(wave):
        bucket *= 2
    padded = np.zeros((1, bucket), np.float32)
    padded[0, : len(wave)] = wave
    return np.asarray(_log_mel(padded, np.array([len(wave)], np.int32), sizes))[0, : len(wave) // hop]


@functools.partial(jax.jit, static_argnums=2)
def _log_mel(wave: jax.Array, length: jax.Array, config: MelConfig) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return mel_24k(wave, length, config)


def save_voice(path: str | Path, voice: Voice) -> None:
    """Writes one safetensors file, whole or not at all.

    Raises:
        MossError: the file cannot be written.
    """
    tensors = {name: np.asarray(getattr(voice, name)) for name in ("codes", "mel", "embedding")}
    save_tensors(path, tensors, {"format": FORMAT})


def load_voice(path: str | Path, config: SpeechDecoderConfig) -> Voice:
    """Reads the file that `save_voice` wrote.

    Raises:
        MossError: it is not a voice, or does not fit this decoder.
    """
    reader = open_tensors(path)
    expected = {"codes": np.int32, "mel": np.float32, "embedding": np.float32}
    found = {name: info.dtype for name, info in reader.tensors.items()}
    if reader.metadata.get("format") != FORMAT or found != expected:
        raise MossError(f"{path}: not a voice, expected a file that `moss-jax voice` wrote")
    voice = Voice(**{name: np.array(reader.read(name)) for name in expected})
    try:
        check_voice(config, voice)
    except MossError as error:
        raise MossError(f"{path}: {error}") from error
    return voice

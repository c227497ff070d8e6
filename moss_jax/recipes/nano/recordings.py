"""A recording of nano's corpus or test items: a text, a voice and conditions, synthesised with espeak-ng."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.audio.wave import resample, save_audio
from moss_jax.data.espeak import speak

# Hz. Questions are input of the speech tokenizer only, answers are output of the decoder too.
SAMPLE_RATES = {"question": 16000, "answer": 24000}
ManifestLine = dict[str, Any]  # audio, text, words


@dataclass(frozen=True)
class RecordingConditions:
    """Level, noise and pauses of a recording.

    Attributes:
        level: gain in dB.
        signal_to_noise: ratio in dB.
        before, after: seconds of pause.
    """

    level: float
    signal_to_noise: float
    before: float = 0.0
    after: float = 0.0

    def record(self, wave: np.ndarray, rate: int, seed: int) -> np.ndarray:
        """A wave float32 [samples] under these conditions; the seed determines the noise and its colour."""
        draw = np.random.default_rng(seed)
        pauses = round(self.before * rate), round(self.after * rate)
        samples = len(wave) + sum(pauses)
        low_pass = draw.uniform(0, 0.95) ** np.arange(64)  # impulse response of a one-pole low-pass filter
        noise = np.convolve(draw.standard_normal(samples), low_pass)[:samples]
        speech_level = np.sqrt(np.mean(np.square(wave)))
        noise *= speech_level * 10 ** (-self.signal_to_noise / 20) / np.std(noise)
        return np.clip((np.pad(wave, pauses) + noise) * 10 ** (self.level / 20), -1, 1).astype(np.float32)


@dataclass(frozen=True)
class Utterance:
    """A text with everything that determines its recording.

    Attributes:
        use: a key of SAMPLE_RATES.
        speed: of playback; above 1 the recording is shorter and higher.
    """

    text: str
    voice: str
    words_per_minute: int
    pitch: int
    use: str
    speed: float = 1.0
    conditions: RecordingConditions | None = None


def synthesize(folder: Path, path: str, utterance: Utterance) -> ManifestLine:
    """Writes the recording FOLDER/PATH and returns its manifest line."""
    wave, rate, words = speak(utterance.text, utterance.voice, utterance.words_per_minute, utterance.pitch)
    target_rate = SAMPLE_RATES[utterance.use]
    # Rounded to 50 Hz: the resampling filter is shorter for rates with a large common divisor.
    played_rate = round(rate * utterance.speed / 50) * 50
    speed = played_rate / rate
    conditions = utterance.conditions
    wave = resample(wave, played_rate, target_rate)
    if conditions is not None:
        wave = conditions.record(wave, target_rate, zlib.crc32(utterance.text.encode()))
    save_audio(folder / path, wave, target_rate)
    before = 0.0 if conditions is None else conditions.before
    times = [[word, round(before + start / speed, 3), round(before + end / speed, 3)] for word, start, end in words]
    return {"audio": path, "text": utterance.text, "words": times}

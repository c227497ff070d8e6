"""The rule for recordings without speech."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.audio import check_speech, load_audio
from moss_jax.audio.speech import speech_level
from moss_jax.errors import MossError

RNG = np.random.default_rng(0)


def noise(seconds, level, rate=16000):
    """Noise with an RMS of `level` dBFS."""
    return (RNG.normal(size=round(seconds * rate)) * 10 ** (level / 20)).astype(np.float32)


def click(value=1.0):
    wave = np.zeros(16000, np.float32)
    wave[8000] = value
    return wave


NO_SPEECH = {
    "silence": np.zeros(16000, np.float32),
    "near silence": noise(1, -90),
    "constant": np.full(16000, 0.5, np.float32),
    "a constant and dither": np.full(16000, -0.2, np.float32) + noise(1, -96),
    "one click": click(),
    "a beep of 60 ms": np.concatenate([np.zeros(8000, np.float32), noise(0.06, -10), np.zeros(8000, np.float32)]),
}


@pytest.mark.parametrize("name", NO_SPEECH)
def test_what_holds_no_speech_is_refused_with_its_level(name):
    with pytest.raises(MossError, match=r"^q\.wav: no speech found \(.*(silence|dBFS)\), expected") as error:
        check_speech(NO_SPEECH[name], 16000, "q.wav")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("samples", [0, 1, 100, 1599])
def test_what_is_too_short_is_refused(samples):
    with pytest.raises(MossError, match="too short to hold speech, expected at least"):
        check_speech(noise(1, -20)[:samples], 16000)


@pytest.mark.parametrize("rate", [1000, 8000, 22050, 44100, 768000])
@pytest.mark.parametrize("level", [-60, -30, 0])
def test_sound_passes_at_every_rate(rate, level):
    check_speech(noise(0.3, level, rate), rate)
    with pytest.raises(MossError):
        check_speech(noise(0.3, -80, rate), rate)


@settings(deadline=None)
@given(st.floats(-60, 0), st.integers(1600, 32000), st.floats(-0.5, 0.5))
def test_the_level_is_that_of_the_sound(level, samples, offset):
    wave = noise(samples / 16000, level) + np.float32(offset)
    assert abs(speech_level(wave, 16000) - level) < 1.5


@pytest.mark.parametrize("name", ["prompt_en.wav", "prompt_cn.wav", "reference_zh.wav", "reference_en_0.mp3"])
def test_speech_passes_35_dB_below_its_level_but_not_80(recording, name):
    wave, rate = load_audio(recording(name))
    check_speech(wave, rate)
    check_speech(wave * np.float32(10 ** (-35 / 20)), rate)
    with pytest.raises(MossError, match="no speech found"):
        check_speech(wave * np.float32(1e-4), rate)

"""espeak-ng: from the package that the test extra brings, with nothing installed in the system."""

import ctypes.util
import importlib.util
from pathlib import Path

import espeakng_loader
import pytest

from moss_jax.data import espeak
from moss_jax.errors import MossError


@pytest.fixture
def afresh():
    """The library is looked for again, in this test and after it."""
    espeak.load_library.cache_clear()
    yield
    espeak.load_library.cache_clear()


def spoken():
    wave, rate, words = espeak.speak("One two.", "en-us+klatt3", 150, 50)
    return len(wave) / rate, [word for word, _, _ in words]


def test_no_system_library_is_needed(afresh, monkeypatch):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    opened = []
    open_library = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: opened.append(Path(name)) or open_library(name))
    seconds, words = spoken()
    assert 0.5 < seconds < 3 and words == ["One", "two."]
    assert [path.parent for path in opened] == [Path(espeakng_loader.__file__).parent]


def test_speed_pitch_and_variant_are_obeyed(afresh):
    text = "Seven plus five is twelve."
    plain, _, _ = espeak.speak(text, "en-us", 150, 50)
    fast, _, _ = espeak.speak(text, "en-us", 300, 50)
    assert len(fast) < 0.7 * len(plain)
    for voice in ("en-us+m3", "en-us+klatt4"):
        other, _, _ = espeak.speak(text, voice, 150, 50)
        assert len(other) != len(plain)
    with pytest.raises(MossError, match="not a voice of espeak-ng"):
        espeak.speak(text, "no-such-voice")


def test_without_any_library_it_is_one_line(afresh, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: "libno-such-espeak.so")
    with pytest.raises(MossError, match=r"pip install 'moss-jax\[espeak\]'"):
        spoken()

"""Speech synthesis with espeak-ng, with the time of each word.

The shared library is called directly, because the `espeak-ng` program does not report when a word begins. It is taken
from the Python package espeakng-loader (`pip install 'moss-jax[espeak]'`) if that is installed, otherwise from the
system (Debian: `apt install espeak-ng`). The package is preferred because its version, and so the sound, is the same on
every machine.
"""

import ctypes
import ctypes.util
import importlib.util
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from moss_jax.audio.pcm import from_pcm16
from moss_jax.errors import MossError

# Constants of espeak-ng's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2
CHARS_UTF8 = 1
POSITION_BY_CHARACTER = 1
PARAMETER_RATE = 1
PARAMETER_PITCH = 3
EVENT_LIST_TERMINATED = 0
EVENT_WORD = 1
INSTALL = "pip install 'moss-jax[espeak]' or apt install espeak-ng"


class _Event(ctypes.Structure):
    """espeak_EVENT."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@lru_cache(maxsize=1)
def load_library() -> tuple[ctypes.CDLL, int]:
    """The initialised library and its sample rate in Hz."""
    if importlib.util.find_spec("espeakng_loader") is not None:
        import espeakng_loader

        name = espeakng_loader.get_library_path()
        voices = espeakng_loader.get_data_path().encode()
    else:
        name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
        voices = None  # the default folder of the library
    try:
        library = ctypes.CDLL(name)
    except OSError:
        raise MossError(f"espeak-ng is not installed, expected it for synthetic speech: {INSTALL}") from None
    rate = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, voices, 0)
    if rate <= 0:
        raise MossError(f"espeak-ng could not be initialised, its voices are missing: {INSTALL}")
    return library, rate


def speak(
    text: str, voice: str = "en-us", words_per_minute: int = 150, pitch: int = 50
) -> tuple[np.ndarray, int, list[tuple[str, float, float]]]:
    """Synthesises speech.

    Args:
        voice: an espeak-ng voice, such as "en-us" or "en-us+klatt3".
        words_per_minute: 80 to 450.
        pitch: 0 to 99.

    Returns:
        (wave float32 [samples], its rate in Hz, (word, start, end) in seconds for each white-space separated word).

    Raises:
        MossError: espeak-ng is missing, there is no such voice, or the text has no word.
    """
    words = text.split()
    if not words:
        raise MossError("text to synthesise: has no word")
    library, rate = load_library()
    if library.espeak_SetVoiceByName(voice.encode()):
        raise MossError(f"voice {voice!r}: not a voice of espeak-ng, `espeak-ng --voices` lists them")
    library.espeak_SetParameter(PARAMETER_RATE, words_per_minute, 0)
    library.espeak_SetParameter(PARAMETER_PITCH, pitch, 0)
    parts: list[np.ndarray] = []
    word_starts: list[tuple[int, int]] = []  # (position in the text, first sample) of each word event

    def receive(samples: Any, count: int, events: Any) -> int:
        if count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != EVENT_LIST_TERMINATED:
            if events[index].type == EVENT_WORD:
                word_starts.append((events[index].text_position - 1, events[index].sample))
            index += 1
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    data = " ".join(words).encode()
    library.espeak_Synth(data, len(data) + 1, 0, POSITION_BY_CHARACTER, 0, CHARS_UTF8, None, None)
    library.espeak_Synchronize()
    wave = from_pcm16(np.concatenate(parts))
    return wave, rate, _word_times(words, word_starts, len(wave), rate)


def _word_times(
    words: list[str], word_starts: list[tuple[int, int]], samples: int, rate: int
) -> list[tuple[str, float, float]]:
    """(word, start, end) in seconds. Words that espeak-ng speaks as one ("of the") share its time by their letters."""
    text_starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    first_samples: dict[int, int] = {}  # of the words that have an event
    for position, sample in sorted(word_starts, key=lambda start: start[1]):
        word = min(int(np.searchsorted(text_starts, position, "right")) - 1, len(words) - 1)
        if not first_samples or word > max(first_samples):
            first_samples[word] = min(sample, samples)
    first_samples.setdefault(0, 0)
    times = []
    for word, next_word in pairwise([*sorted(first_samples), len(words)]):
        start = first_samples[word]
        end = first_samples[next_word] if next_word < len(words) else samples
        letters = np.cumsum([0, *map(len, words[word:next_word])])
        bounds = start + (end - start) * letters / max(1, letters[-1])
        for i in range(next_word - word):
            times.append((words[word + i], float(bounds[i]) / rate, float(bounds[i + 1]) / rate))
    return times

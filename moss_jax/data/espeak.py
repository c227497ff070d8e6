"""Speech synthesis with espeak-ng, with the time of each word.

The shared library is called, as the `espeak-ng` program does not report when a word begins. It is taken from the Python
package espeakng-loader (`pip install 'moss-jax[espeak]'`) where that is installed, else from the system (Debian:
`apt install espeak-ng`). The package comes first because its version, and so the sound, is the same on every machine.
"""

import ctypes
import ctypes.util
import importlib.util
from functools import lru_cache
from itertools import pairwise

import numpy as np

from moss_jax.audio.pcm import from_pcm16
from moss_jax.errors import MossError

# espeak_AUDIO_OUTPUT, espeakCHARS_UTF8, POS_CHARACTER of speak_lib.h
SYNCHRONOUS = 2
UTF8 = 1
BY_CHARACTER = 1
# espeak_PARAMETER
RATE = 1
PITCH = 3
# espeak_EVENT_TYPE
ENDED = 0
WORD = 1
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
def _library() -> tuple[ctypes.CDLL, int]:
    """The initialised library and its sample rate in Hz."""
    if importlib.util.find_spec("espeakng_loader") is not None:
        import espeakng_loader

        name = espeakng_loader.get_library_path()
        voices = espeakng_loader.get_data_path().encode()
    else:
        name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
        voices = None  # the library knows where the system keeps them
    try:
        library = ctypes.CDLL(name)
    except OSError:
        raise MossError(f"espeak-ng is not installed, expected it for synthetic speech: {INSTALL}") from None
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, voices, 0)
    if rate <= 0:
        raise MossError(f"espeak-ng does not start, expected its voices beside the library: {INSTALL}")
    return library, rate


def speak(
    text: str, voice: str = "en-us", words_per_minute: int = 150, pitch: int = 50
) -> tuple[np.ndarray, int, list[tuple[str, float, float]]]:
    """Text -> speech.

    Args:
        voice: a name of espeak-ng's, such as "en-us" or "en-us+klatt3".
        words_per_minute: 80 to 450.
        pitch: 0 to 99.

    Returns:
        wave float32 [samples], its rate in Hz, and (word, start, end) in seconds for each of the blank-separated words.

    Raises:
        MossError: no espeak-ng, no such voice, or a text without words.
    """
    words = text.split()
    if not words:
        raise MossError("text to speak: holds no word")
    library, rate = _library()
    if library.espeak_SetVoiceByName(voice.encode()):
        raise MossError(f"voice {voice!r}: espeak-ng has none of this name, `espeak-ng --voices` lists them")
    library.espeak_SetParameter(RATE, words_per_minute, 0)
    library.espeak_SetParameter(PITCH, pitch, 0)
    parts: list[np.ndarray] = []
    begun: list[tuple[int, int]] = []  # (place in the text, first sample) of each word that is announced

    def receive(samples, count, event):
        if count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        place = 0
        while event[place].type != ENDED:
            if event[place].type == WORD:
                begun.append((event[place].text_position - 1, event[place].sample))
            place += 1
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    said = " ".join(words)
    data = said.encode()
    library.espeak_Synth(data, len(data) + 1, 0, BY_CHARACTER, 0, UTF8, None, None)
    library.espeak_Synchronize()
    wave = from_pcm16(np.concatenate(parts))
    return wave, rate, _times(words, begun, len(wave), rate)


def _times(words: list[str], begun: list[tuple[int, int]], samples: int, rate: int) -> list[tuple[str, float, float]]:
    """When each word begins and ends. Words that espeak-ng runs together ("of the") share their time by letters."""
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    first = {}  # word -> first sample
    for place, sample in sorted(begun, key=lambda entry: entry[1]):
        word = min(int(np.searchsorted(starts, place, "right")) - 1, len(words) - 1)
        if not first or word > max(first):
            first[word] = min(sample, samples)
    first.setdefault(0, 0)
    known = [*sorted(first), len(words)]
    times = []
    for word, following in pairwise(known):
        end = first[following] if following < len(words) else samples
        marks = first[word] + (end - first[word]) * np.cumsum([0, *map(len, words[word:following])]) / max(
            1, sum(map(len, words[word:following]))
        )
        times += [
            (words[word + i], float(marks[i]) / rate, float(marks[i + 1]) / rate) for i in range(following - word)
        ]
    return times

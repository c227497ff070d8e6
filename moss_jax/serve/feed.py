"""Streaming of speech to the browser: raw samples in one HTTP response, sent while they are generated."""

import queue
import secrets
from collections.abc import Iterator

import numpy as np

from moss_jax.audio.pcm import to_pcm16


class SpeechFeed:
    """A thread-safe queue of audio: `push` takes waves, iteration gives 16-bit little-endian mono; for one reader."""

    def __init__(self, sample_rate: int):
        self.key = secrets.token_urlsafe(16)
        self.sample_rate = sample_rate
        self._pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def push(self, wave: np.ndarray) -> None:
        """Adds samples float32 [T], clipped to [-1, 1]."""
        if wave.size:
            self._pieces.put(samples(wave))

    def finish(self) -> None:
        """Ends the iteration after what was pushed."""
        self._pieces.put(None)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pieces.get, None)


def samples(wave: np.ndarray) -> bytes:
    """A wave as 16-bit little-endian samples, as in a wav file."""
    return to_pcm16(wave).tobytes()

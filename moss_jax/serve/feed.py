"""Speech on its way into the browser: raw samples over one HTTP answer, sent while they are being made."""

import queue
import secrets
from collections.abc import Iterator

import numpy as np

from moss_jax.audio.pcm import to_pcm16


class SpeechFeed:
    """What is pushed on one side comes out as bytes on the other, 16-bit little-endian mono; for one listener."""

    def __init__(self, sample_rate: int):
        self.key = secrets.token_urlsafe(16)
        self.sample_rate = sample_rate
        self._pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def push(self, wave: np.ndarray) -> None:
        """Samples float32 [T]; what lies outside [-1, 1] is clipped."""
        if wave.size:
            self._pieces.put(samples(wave))

    def finish(self) -> None:
        """No more will come."""
        self._pieces.put(None)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pieces.get, None)


def samples(wave: np.ndarray) -> bytes:
    """A wave as 16-bit samples, as a wav file has them."""
    return to_pcm16(wave).tobytes()

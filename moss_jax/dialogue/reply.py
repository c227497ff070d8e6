"""What a system answers: a whole reply, or a stream of its pieces."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moss_jax.audio import save_audio
from moss_jax.dialogue.conversation import Conversation
from moss_jax.errors import MossError


@dataclass(frozen=True, eq=False)
class Reply:
    """A reply of the assistant.

    Attributes:
        text: the written reply; usually empty in a spoken one.
        codes: int32 [N], the speech codes of a spoken reply.
        wave: float32 [samples_per_code * N]; None for a written reply.
        sample_rate: of the wave, Hz.
        complete: False when the reply was stopped or cut off by its maximum length.
        notices: one line for each thing that the user should know.
        conversation: to continue with the next question; None in a batch.
    """

    text: str
    codes: np.ndarray
    wave: np.ndarray | None
    sample_rate: int
    complete: bool
    notices: tuple[str, ...] = ()
    conversation: Conversation | None = None

    def save(self, path: str | Path) -> None:
        """Writes the wave as wav or flac, whole or not at all.

        Raises:
            MossError: the reply has no speech, or the file cannot be written.
        """
        if self.wave is None or not self.wave.size:
            kind = "a written one" if self.wave is None else "one without any speech"
            raise MossError(f"{path}: not written, the reply is {kind}")
        save_audio(path, self.wave, self.sample_rate)


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a streamed reply: text, and a wave float32 [samples]; either may be empty."""

    text: str
    wave: np.ndarray


class ReplyStream:
    """An iterator over the pieces of a reply. `reply` is the whole reply once the iteration has ended.

    Attributes:
        sample_rate: of the waves, Hz; 0 for a written reply.
        reply: None until the iteration has ended.
    """

    def __init__(self, pieces: Iterator[Piece | Reply], sample_rate: int, stopped: threading.Event):
        self._pieces = pieces
        self._stopped = stopped
        self.sample_rate = sample_rate
        self.reply: Reply | None = None

    def __iter__(self) -> Iterator[Piece]:
        for piece in self._pieces:
            if isinstance(piece, Reply):
                self.reply = piece
            else:
                yield piece

    def stop(self) -> None:
        """Ends the reply after the next piece, from any thread. `reply` then has what was generated so far, and its
        conversation can be continued."""
        self._stopped.set()

"""The turns of a conversation, each entirely text or entirely speech."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moss_jax.audio.recording import as_rate
from moss_jax.documents import check_encodable, shown
from moss_jax.errors import MossError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, eq=False)
class Turn:
    """One turn: exactly one of `text`, `audio` and `codes`.

    Attributes:
        role: "system", "user" or "assistant".
        text: plain text; special strings in it have no effect.
        audio: a recording: the path of a file, or samples as for `moss_jax.audio.as_recording`.
        codes: speech codes [N] from the speech tokenizer, 12.5 per second.
        sample_rate: of an array of samples, a whole number of Hz.

    Raises:
        MossError: an unknown role, not exactly one content, or a content of the wrong type.
    """

    role: str
    text: str | None = None
    audio: str | Path | np.ndarray | None = None
    codes: Sequence[int] | np.ndarray | None = None
    sample_rate: int | float | str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise MossError(f"turn: role is {shown(self.role)}, expected one of {', '.join(ROLES)}")
        given = [name for name in ("text", "audio", "codes") if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "nothing"
            raise MossError(f"turn of {self.role}: it has {what}, expected exactly one of text, audio and codes")
        if self.text is not None and not isinstance(self.text, str):
            raise MossError(f"turn of {self.role}: text is {type(self.text).__name__}, expected a string")
        if self.text is not None:
            check_encodable(self.text, f"turn of {self.role}: text")
        if isinstance(self.audio, np.ndarray):
            if self.sample_rate is None:
                raise MossError(f"turn of {self.role}: audio is an array without a sample_rate in Hz")
            as_rate(self.sample_rate, f"turn of {self.role}")
        if self.audio is not None and not isinstance(self.audio, (str, Path, np.ndarray)):
            found = type(self.audio).__name__
            raise MossError(f"turn of {self.role}: audio is {found}, expected a path or a numpy array of samples")
        if self.codes is not None:
            try:
                codes = np.asarray(self.codes)
            except (ValueError, OverflowError):  # a ragged list, or integers of more than 64 bits
                codes = np.zeros((), object)
            if codes.ndim != 1 or (codes.size and not np.issubdtype(codes.dtype, np.integer)):
                raise MossError(
                    f"turn of {self.role}: codes have shape {list(codes.shape)} and dtype {codes.dtype}, "
                    "expected a list of integers"
                )


def check_turns(turns: Sequence[Turn]) -> None:
    """Checks that turns can be answered: there is at least one, none is empty, and the last one is the user's.

    Raises:
        MossError: they cannot.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise MossError(f"turns: is {type(turns).__name__}, expected a list of Turns")
    if not turns:
        raise MossError("turns: the list is empty, expected at least one user turn")
    for index, turn in enumerate(turns):
        if not isinstance(turn, Turn):
            raise MossError(f"turns: entry {index} is {type(turn).__name__}, expected a Turn")
        if turn.text is not None and not turn.text.strip():
            raise MossError(f"turns: the {turn.role} turn at {index} has empty text, expected some words")
        if turn.codes is not None and not len(turn.codes):
            raise MossError(f"turns: the {turn.role} turn at {index} has no codes, expected at least one")
    if turns[-1].role != "user":
        raise MossError(f"turns: the last turn is of {turns[-1].role}, expected the user's question")

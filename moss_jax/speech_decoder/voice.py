"""A voice as the speech decoder needs it: what was said in a short recording, how it sounded, and who said it."""

import numpy as np
from flax import struct


@struct.dataclass
class Voice:
    """The conditioning of the flow. Made from a recording by enrolment; `zero()` is no voice in particular."""

    codes: np.ndarray  # int32 [P], of the recording
    mel: np.ndarray  # float32 [4P, M], its natural-log mel at 50 frames a second
    embedding: np.ndarray  # float32 [E], speaker embedding; it is normalised where it is used

    @classmethod
    def zero(cls, mel_bins: int = 80, speaker_size: int = 192) -> "Voice":
        """The voice without a recording, legal for the decoder: no prompt and a zero embedding."""
        return cls(np.zeros(0, np.int32), np.zeros((0, mel_bins), np.float32), np.zeros(speaker_size, np.float32))

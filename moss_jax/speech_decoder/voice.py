"""A voice: the codes, the mel and the speaker embedding of a short recording."""

import numpy as np
from flax import struct


class Voice(struct.PyTreeNode):
    """The conditioning of the flow, made from a recording by enrolment; `zero()` is no particular voice."""

    codes: np.ndarray  # int32 [P]
    mel: np.ndarray  # float32 [4P, M], its natural-log mel at 50 frames per second
    embedding: np.ndarray  # float32 [E], speaker embedding, not normalised

    @classmethod
    def zero(cls, mel_bins: int = 80, speaker_size: int = 192) -> "Voice":
        """The voice without a recording, which the decoder accepts: no prompt and a zero embedding."""
        return cls(np.zeros(0, np.int32), np.zeros((0, mel_bins), np.float32), np.zeros(speaker_size, np.float32))

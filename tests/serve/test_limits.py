"""What the demo keeps and takes, without a model."""

from types import SimpleNamespace

import numpy as np
import pytest

from moss_jax.audio import save_audio
from moss_jax.errors import MossError
from moss_jax.serve.session import Limits, Session

RATE = 16000
SYSTEM = SimpleNamespace(can_enrol=True, enrol=lambda recording: "a voice")


@pytest.fixture
def tone(tmp_path):
    """One second, 32 kB."""
    path = tmp_path / "tone.wav"
    save_audio(path, 0.3 * np.sin(np.arange(RATE) / 20), RATE)
    return path


def test_clear_leaves_no_recording(tone, tmp_path):
    session = Session(SYSTEM, tmp_path / "session")
    for name in ("1-user.wav", "1-user.png", "2-assistant.wav"):
        (session.folder / name).write_bytes(tone.read_bytes())
    session.clear()
    assert list(session.folder.iterdir()) == []
    session.close()
    assert not session.folder.exists()


def test_a_recording_above_the_limit_is_refused(tone, tmp_path):
    size = tone.stat().st_size
    taken = Session(SYSTEM, tmp_path / "taken", Limits(upload_bytes=size))
    assert taken.enrol(tone) == 1.0
    refused = Session(SYSTEM, tmp_path / "refused", Limits(upload_bytes=size - 1))
    with pytest.raises(MossError, match="MB are taken; send a shorter one"):
        refused.enrol(tone)
    assert refused.voice is None

"""The demo's logic without a browser: four pairings, a second turn, stop, clear, limits, what streams is what stays."""

import numpy as np
import pytest
import soundfile

import moss_jax
from moss_jax.audio.wave import load_audio
from moss_jax.checkpoint.system_folder import NANO_FOLDER
from moss_jax.convert.random_system import init_random
from moss_jax.errors import MossError
from moss_jax.serve import cards
from moss_jax.serve.feed import SpeechFeed, samples
from moss_jax.serve.session import OWN_VOICE, Entry, Limits, Session, warm_up
from moss_jax.speech_decoder.voice import Voice
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT
from tests.compilations import compilations

pytestmark = pytest.mark.slow

pytest.importorskip("matplotlib")

SPEAK = "Speak."
WRITE = "Write."
SPOKEN = {"reply": "speech", "system_turn": SPEAK, "max_new_tokens": 14, "min_new_tokens": 14}
WRITTEN = {"reply": "text", "system_turn": WRITE, "max_new_tokens": 15}
LONG = {**SPOKEN, "max_new_tokens": 120, "min_new_tokens": 120}


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    path = tmp_path_factory.mktemp("systems") / "tiny"
    init_random(path, say=lambda line: None)
    return moss_jax.load(path, context=256)


@pytest.fixture
def session(system, tmp_path):
    return Session(
        system,
        tmp_path / "session",
        Limits(question_seconds=2, question_characters=40, voice_seconds=2, decoded_bytes=2**20),
    )


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """1.1 s of two tones at 22050 Hz, stereo."""
    time = np.arange(24255) / 22050
    wave = 0.3 * np.sin(2 * np.pi * 220 * time) + 0.1 * np.sin(2 * np.pi * 1310 * time)
    path = tmp_path_factory.mktemp("audio") / "question.wav"
    soundfile.write(path, np.stack([wave, 0.5 * wave], 1), 22050)
    return path


def test_four_pairings_in_one_conversation(session, system, recording):
    waves = [piece.wave for piece in session.ask(recording=recording, **SPOKEN)]
    question, answer = session.entries
    assert question.audio.is_file() and question.seconds == pytest.approx(1.1)
    for entry in (question, answer):
        picture = session.file(entry.audio.with_suffix(".png").name)
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.parent == session.folder
    recorded, rate = load_audio(answer.audio)
    assert (len(recorded), rate) == (14 * 1920, 24000)
    np.testing.assert_allclose(np.concatenate(waves), recorded, atol=1 / 32768)
    assert len(waves) > 1 and 0 < answer.first < answer.spent
    assert answer.real_time_factor == pytest.approx(answer.spent / (14 * 0.08))

    # The second turn goes on from the first, as `System` does by itself.
    again = system.stream(
        [moss_jax.Turn("system", text=SPEAK), question.turn], seed=0, max_new_tokens=14, min_new_tokens=14
    )
    list(again)
    np.testing.assert_array_equal(again.reply.codes, answer.turn.codes)
    follow_up = system.stream(
        [moss_jax.Turn("user", text="And?")],
        conversation=again.reply.conversation,
        max_new_tokens=14,
        min_new_tokens=14,
    )
    list(follow_up)
    list(session.ask(text=" And? ", **SPOKEN))
    assert [entry.role for entry in session.entries] == ["user", "assistant"] * 2
    np.testing.assert_array_equal(session.entries[3].turn.codes, follow_up.reply.codes)

    # Another kind of answer has another system turn: the conversation is prefilled anew, and nothing of it is lost.
    prefilled = [moss_jax.Turn("system", text=WRITE), *(entry.turn for entry in session.entries)]
    text = "".join(piece.text for piece in session.ask(text="So?", **WRITTEN))
    assert session.entries[5].text == text and session.entries[5].audio is None
    assert session.entries[5].real_time_factor is None
    assert text == system.reply([*prefilled, moss_jax.Turn("user", text="So?")], reply="text", max_new_tokens=15).text
    list(session.ask(recording=recording, **WRITTEN))
    assert len(session.entries) == 8 and len({entry.audio for entry in session.entries if entry.audio}) == 4


def test_stop_ends_the_answer_and_it_can_be_asked_on(session):
    pieces = session.ask(text="Count", **LONG)
    first = next(pieces)
    session.stop()
    rest = list(pieces)
    stopped = session.entries[1]
    assert len(rest) <= 1 and 0 < len(stopped.turn.codes) < 30
    assert sum(piece.wave.size for piece in [first, *rest]) == 1920 * len(stopped.turn.codes)
    assert any("stopped" in notice for notice in stopped.notices)
    list(session.ask(text="Go on", **SPOKEN))
    assert len(session.entries) == 4 and len(session.entries[3].turn.codes) == 14


def test_clear_forgets_and_removes_files_also_in_the_middle_of_an_answer(session, recording):
    list(session.ask(recording=recording, **SPOKEN))
    sounds = [entry.audio for entry in session.entries]
    names = [*(path.name for path in sounds), *(path.with_suffix(".png").name for path in sounds)]
    assert all(session.file(name).is_file() for name in names) and len(list(session.folder.iterdir())) == 4
    session.clear()
    assert session.entries == [] and list(session.folder.iterdir()) == []
    assert not any(session.file(name) for name in [*names, "../session", "x.wav"])
    pieces = session.ask(recording=recording, **LONG)
    next(pieces)
    session.clear()
    assert len(list(pieces)) <= 1
    assert session.entries == [] and list(session.folder.iterdir()) == []
    pieces = session.ask(text="Old", **SPOKEN)
    session.clear()
    assert list(pieces) == [] == session.entries
    list(session.ask(text="New", **SPOKEN))
    assert len(session.entries) == 2
    session.close()
    assert not session.folder.exists()


def test_what_is_too_much_or_too_little_is_reported_in_one_line(session, recording, tmp_path):
    tone = 0.1 * np.sin(np.arange(3 * 16000) / 5)
    soundfile.write(tmp_path / "long.wav", tone, 16000)
    soundfile.write(tmp_path / "silent.wav", 0 * tone[:9000], 16000)
    soundfile.write(tmp_path / "short.wav", tone[100:101], 16000)
    soundfile.write(tmp_path / "wide.flac", np.zeros((384000, 8), np.int16), 384000)
    (tmp_path / "text.wav").write_text("no sound")
    asked = {
        "write a question first": {"text": "  "},
        "question has 41 characters, at most 40": {"text": "x" * 41},
        "prompt has 41 characters, at most 40": {"text": "x", "system_turn": "x" * 41},
        "the question: longer than 2 s": {"recording": tmp_path / "long.wav"},
        "the question: no speech found": {"recording": tmp_path / "silent.wav"},
        "the question: 6.25e-05 s is too short": {"recording": tmp_path / "short.wav"},
        "the question: exceeds the limit of 1 MiB": {"recording": tmp_path / "wide.flac"},
        "the question: not an audio file": {"recording": tmp_path / "text.wav"},
        "system prompt is empty": {"text": "Hi", "system_turn": " "},
        "seed is -1": {"text": "Hi", "seed": -1},
        "no recording of your voice": {"text": "Hi", "voice": OWN_VOICE},
        "temperature is 0": {"text": "Hi", "temperature": 0},
    }
    for message, question in asked.items():
        with pytest.raises(MossError, match=message) as error:
            session.ask(**{**SPOKEN, **question})
        assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    session.limits = Limits(upload_bytes=1000)
    with pytest.raises(MossError, match="MB are taken"):
        session.ask(recording=recording, **SPOKEN)
    assert session.entries == [] and list(session.folder.iterdir()) == []
    with pytest.raises(MossError, match="has: none"):  # the answer fails on its way: the question is forgotten
        list(session.ask(text="Hi", voice="anna", **SPOKEN))
    assert session.entries == []


def test_the_recordings_of_a_conversation_are_limited(session, recording):
    session.limits = Limits(session_bytes=100_000)
    list(session.ask(recording=recording, **SPOKEN))
    with pytest.raises(MossError, match="clear it"):
        session.ask(recording=recording, **SPOKEN)
    assert len(session.entries) == 2
    session.clear()
    list(session.ask(recording=recording, **SPOKEN))


def test_greedy_of_the_page_is_explicit(session):
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 5}
    list(session.ask(text="Hi", greedy=True, **sampling, **WRITTEN))
    assert not any("no effect" in notice for entry in session.entries for notice in entry.notices)


def test_what_is_to_be_known_about_a_recording_is_on_its_card(session, tmp_path):
    tone = 0.3 * np.sin(np.arange(16000) / 9)
    soundfile.write(tmp_path / "cancels.wav", np.stack([tone, -tone], 1), 16000)
    list(session.ask(recording=tmp_path / "cancels.wav", **SPOKEN))
    (notice,) = session.entries[0].notices
    assert "channel" in notice and str(tmp_path) not in notice
    assert notice in cards.conversation(session.entries, "moss/file/x")


def test_the_first_question_compiles_nothing(tmp_path):
    system = moss_jax.load()
    session = Session(system, tmp_path / "session")
    question = NANO_FOLDER / "question.wav"
    warm_up(system)
    with compilations() as compiled:
        list(session.ask(recording=question, reply="speech", system_turn=DEFAULT_SYSTEM_PROMPT["speech"]))
        assert [session.file(entry.audio.with_suffix(".png").name) for entry in session.entries if entry.audio]
        list(session.ask(text="And plus one?", reply="speech", system_turn=DEFAULT_SYSTEM_PROMPT["speech"]))
        session.clear()
        list(session.ask(text="What is one plus two?", reply="text", system_turn=DEFAULT_SYSTEM_PROMPT["text"]))
        session.clear()
        list(session.ask(recording=question, reply="text", system_turn=DEFAULT_SYSTEM_PROMPT["text"]))
    assert compiled == []


def test_an_enrolled_voice_is_spoken_with(session, recording, monkeypatch):
    zero = Voice.zero(80, 192)
    voice = zero.replace(embedding=np.ones_like(zero.embedding))
    monkeypatch.setattr(type(session.system), "enrol", lambda self, recorded: voice if recorded[1] == 22050 else None)
    assert session.enrol(recording) == pytest.approx(1.1)
    own = np.concatenate([piece.wave for piece in session.ask(text="Hi", voice=OWN_VOICE, **SPOKEN)])
    session.clear()
    plain = np.concatenate([piece.wave for piece in session.ask(text="Hi", **SPOKEN)])
    assert own.shape == plain.shape and np.abs(own - plain).max() > 1e-3
    session.limits = Limits(voice_seconds=1)
    with pytest.raises(MossError, match="longer than 1 s"):
        session.enrol(recording)
    monkeypatch.setattr(type(session.system), "can_enrol", False)
    with pytest.raises(MossError, match="no speaker network"):
        session.enrol(recording)


def test_a_feed_gives_the_samples_of_the_wav_file(tmp_path):
    wave = np.random.default_rng(0).uniform(-1.2, 1.2, 5000).astype(np.float32)
    feed = SpeechFeed(24000)
    for start in range(0, 5000, 1700):
        feed.push(wave[start : start + 1700])
    feed.push(wave[:0])
    feed.finish()
    assert b"".join(feed) == samples(wave)
    soundfile.write(tmp_path / "x.wav", np.clip(wave, -1, 1), 24000, subtype="PCM_16")
    kept = soundfile.read(tmp_path / "x.wav", dtype="int16")[0].astype(int)
    assert np.abs(np.frombuffer(samples(wave), "<i2") - kept).max() <= 1


def test_cards_escape_what_was_written():
    entry = Entry(None, "user", "<script>alert(1)</script>", notices=("<b>",))
    shown = cards.conversation([entry], "moss/file/x")
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "&lt;b&gt;" in shown
    assert "<img" not in cards.answering("text", "<img src=x>")
    assert cards.conversation([], "moss/file/x") == cards.EMPTY

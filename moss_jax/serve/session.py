"""One person's conversation in the demo: a question in, pieces of the answer out, and files that go when it goes."""

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.arguments import check_seed
from moss_jax.audio import Recording, check_speech, load_audio, read_audio, save_audio
from moss_jax.audio.features import MEL_24K
from moss_jax.dialogue.system import Piece, Reply, ReplyStream, System
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.generate.settings import RANDOM_SETTINGS
from moss_jax.serve.feed import SpeechFeed
from moss_jax.serve.picture import draw, mel
from moss_jax.speech_decoder.voice import Voice
from moss_jax.speech_tokenizer.encode import SEGMENT_LENGTHS

WARM_SECONDS = 15.0  # questions and answers up to this length compile nothing after `warm_up`
OWN_VOICE = "my recording"  # among the voices' names: the one that this person enrolled


@dataclass(frozen=True)
class Limits:
    """What one person may send, and how much the demo keeps of everybody."""

    upload_bytes: int = 25 * 2**20  # of one file
    uploads_bytes: int = 500 * 2**20  # of all files that no question has used yet
    upload_seconds: float = 600.0  # how long such a file is kept
    decoded_bytes: int = 256 * 2**20  # of one recording: samples x channels x 4
    question_seconds: float = 60.0
    question_characters: int = 4000  # of the system prompt too
    voice_seconds: float = 30.0
    sessions: int = 32
    session_bytes: int = 200 * 2**20  # of the recordings of one conversation
    idle_seconds: float = 3600.0  # after which an unused session is removed


@dataclass(eq=False)
class Entry:
    """One turn as the page shows it."""

    turn: Turn | None  # what the model is told again when the system turn changes; None: nothing was said
    role: str  # "user" or "assistant"
    text: str = ""
    audio: Path | None = None  # wav; its picture, waveform and spectrogram, is a png of the same name
    seconds: float = 0.0  # of the audio
    first: float | None = None  # s from the question to the first sound, or the first words
    spent: float | None = None  # s from the question to the end of the answer
    notices: tuple[str, ...] = ()

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of work for a second of speech; None where there is no speech."""
        return self.spent / self.seconds if self.spent is not None and self.seconds else None


@dataclass
class _Question:
    entry: Entry
    recording: Recording | None  # of a spoken one
    asked: float  # clock
    epoch: int  # of the conversation that it belongs to


@dataclass
class Session:
    """Turns, caches and files of one page. Asking and enrolling use the model, so they come one at a time; `stop`,
    `clear` and `close` may come from any thread meanwhile.

    Args:
        system: shared by all sessions.
        folder: of this session alone; made here, and removed by `close`.
    """

    system: System
    folder: Path
    limits: Limits = field(default_factory=Limits)
    entries: list[Entry] = field(default_factory=list)
    voice: Voice | None = None

    def __post_init__(self):
        self.key = secrets.token_urlsafe(16)
        self.used = time.monotonic()  # when it was last asked or looked at
        self.feed: SpeechFeed | None = None  # the latest answer's sound, until it is fetched
        self.folder.mkdir(parents=True)
        self._guard = threading.Lock()  # of entries and files against `clear`
        self._drawing = threading.Lock()  # one picture at a time
        self._epoch = 0
        self._count = 0
        self._stopped = threading.Event()
        self._stream = None
        self._conversation = None
        self._system_turn = None

    def ask(
        self,
        *,
        text: str | None = None,
        recording: str | Path | None = None,
        reply: str = "speech",
        system_turn: str,
        voice: str | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Takes a question, written or else recorded, which is the last of `entries` from then on, and answers it.

        Args:
            reply: "speech" or "text".
            system_turn: when it is another one than before, the conversation so far is told to the model once more.
            voice: a name in the system, OWN_VOICE, or None for the system's default.
            sampling: keywords of `System.settings`.

        Returns:
            The pieces of the answer, as they come. Afterwards the answer is the last of `entries`.

        Raises:
            MossError: at once for a question that cannot be taken, on the way for what goes wrong later; the question
                is then forgotten.
        """
        asked = time.perf_counter()
        self.system.settings(**sampling)
        if sampling.get("greedy"):  # a reply would say that these have no effect
            sampling = {name: value for name, value in sampling.items() if name not in RANDOM_SETTINGS}
        if not system_turn.strip():
            raise MossError("the system prompt is empty; it tells the assistant how to answer")
        most = self.limits.question_characters
        if len(system_turn) > most:
            raise MossError(
                f"the system prompt has {len(system_turn)} characters, at most {most} are taken; shorten it"
            )
        seed = check_seed(seed)
        if voice == OWN_VOICE:
            if self.voice is None:
                raise MossError("there is no recording of your voice yet; upload or record one, or choose another")
            voice = self.voice
        if text is None and recording is None:
            raise MossError("record a question or choose a file first")
        if text is not None:
            question = _Question(self._written(text), None, asked, self._epoch)
        else:
            read = _load(recording, self.limits.question_seconds, "question", self.limits)
            question = _Question(Entry(None, "user", notices=read.notices), read, asked, self._epoch)
            with self._guard:
                kept = sum(path.stat().st_size for path in self.folder.iterdir())
                if kept + 2 * len(read.wave) > self.limits.session_bytes:
                    most = self.limits.session_bytes / 2**20
                    raise MossError(f"the recordings of this conversation take {most:.0f} MB; clear it and ask anew")
                self._keep_wave(question.entry, read.wave, read.rate)
        self._stopped.clear()
        with self._guard:
            self.entries.append(question.entry)
        return self._answer(question, reply, Turn("system", text=system_turn), voice, seed, sampling)

    def stop(self) -> None:
        """Ends the answer that is being made; what was said so far stays and can be asked on from."""
        self._stopped.set()
        if self._stream is not None:
            self._stream.stop()

    def clear(self) -> None:
        """Forgets the conversation and removes its files. An answer that is being made ends and is not kept."""
        self.stop()
        with self._guard:
            self._epoch += 1
            self.entries = []
            self._conversation = None
            for path in self.folder.glob("*"):  # none once it is closed
                path.unlink()

    def close(self) -> None:
        """`clear`, and the folder and the enrolled voice go too."""
        self.clear()
        self.voice = None
        with self._guard:
            shutil.rmtree(self.folder, ignore_errors=True)

    def enrol(self, recording: str | Path) -> float:
        """Answers with OWN_VOICE are in the voice of this recording from now on. Returns its seconds.

        Raises:
            MossError: the system has no speaker network, or the recording is no good.
        """
        if not self.system.can_enrol:
            raise MossError("this system speaks with its own voices only: it has no speaker network")
        read = _load(recording, self.limits.voice_seconds, "voice recording", self.limits)
        self.voice = self.system.enrol((read.wave, read.rate))
        return len(read.wave) / read.rate

    def file(self, name: str) -> Path | None:
        """An entry's sound or picture by its name, or None. A picture is drawn when it is first asked for, so that
        nobody waits for it who waits for an answer."""
        path = self.folder / Path(name).name
        with self._guard:
            entry = next((entry for entry in self.entries if entry.audio and entry.audio.stem == path.stem), None)
        if entry is None or path.suffix not in (".wav", ".png"):
            return None
        if path.suffix == ".wav":
            return path
        with self._drawing:
            if not path.is_file():
                try:
                    draw(path, *load_audio(entry.audio), entry.role)
                except MossError:  # it was cleared meanwhile
                    return None
        with self._guard:
            if entry not in self.entries:
                path.unlink(missing_ok=True)
                return None
        return path

    def _written(self, text: str) -> Entry:
        text = text.strip()
        if not text:
            raise MossError("write a question first")
        most = self.limits.question_characters
        if len(text) > most:
            raise MossError(f"the question has {len(text)} characters, at most {most} are taken; shorten it")
        return Entry(Turn("user", text=text), "user", text)

    def _answer(self, question: _Question, reply, system_turn, voice, seed, sampling) -> Iterator[Piece]:
        done = False
        try:
            if question.recording is not None:
                heard = (question.recording.wave, question.recording.rate)
                question.entry.turn = Turn("user", codes=self.system.encode([heard])[0])
            if question.epoch != self._epoch:
                return
            turns = [question.entry.turn]
            # it can be used once
            conversation = self._conversation
            self._conversation = None
            if conversation is None or self._system_turn != system_turn.text:
                said = [entry.turn for entry in self.entries if entry.turn is not None]
                turns = [system_turn, *said]
                conversation = None
            stream = self._stream = self.system.stream(
                turns, reply=reply, voice=voice, conversation=conversation, seed=seed, **sampling
            )
            if self._stopped.is_set():
                stream.stop()
            first = None
            for piece in stream:
                if first is None and (piece.wave.size if reply == "speech" else piece.text):
                    first = time.perf_counter() - question.asked
                yield piece
            done = self._finish(question, stream, reply, first)
            self._system_turn = system_turn.text
        finally:
            self._stream = None
            if not done:
                self._forget(question)

    def _finish(self, question: _Question, stream: ReplyStream, reply: str, first: float | None) -> bool:
        said: Reply = stream.reply
        answer = Entry(
            _turn(said, reply),
            "assistant",
            said.text,
            first=first,
            spent=time.perf_counter() - question.asked,
            notices=said.notices,
        )
        with self._guard:
            if question.epoch != self._epoch:
                return False
            if said.wave is not None and said.wave.size:
                self._keep_wave(answer, said.wave, said.sample_rate)
            self.entries.append(answer)
            self._conversation = said.conversation
        return True

    def _forget(self, question: _Question) -> None:
        """A question that found no answer."""
        with self._guard:
            if question.epoch == self._epoch:
                self.entries = [entry for entry in self.entries if entry is not question.entry]
            if question.entry.audio is not None:
                question.entry.audio.unlink(missing_ok=True)

    def _keep_wave(self, entry: Entry, wave: np.ndarray, rate: int) -> None:
        self._count += 1
        entry.audio = self.folder / f"{self._count}-{entry.role}.wav"
        entry.seconds = len(wave) / rate
        save_audio(entry.audio, wave, rate)


def warm_up(system: System, say: Any = lambda line: None) -> None:
    """Compiles what the first answers need, so that nobody waits for it in the page.

    That is: a question of each length that is compiled separately, up to WARM_SECONDS; spoken and written answers to a
    spoken question and to one that follows it, each stopped at once; and the pictures. The second question is long, so
    that a conversation that begins with a small cache has outgrown it once, where it can.
    """
    say("getting ready to listen")
    tokenizer = system.speech_tokenizer
    rate = tokenizer.config.sample_rate
    noise = np.random.default_rng(0).normal(0, 0.1, 20 * rate).astype(np.float32)
    for sixteenths in SEGMENT_LENGTHS:
        samples = sixteenths * tokenizer.config.samples_per_segment // 16
        if samples <= WARM_SECONDS * rate:
            tokenizer.encode([noise[:samples]])
    for reply in ("speech", "text"):
        say(f"getting ready to answer in {reply}")
        conversation = None
        for seconds in (2, 20):
            question = Turn("user", audio=noise[: seconds * rate], sample_rate=rate)
            stream = system.stream([question], reply=reply, conversation=conversation)
            for _ in stream:
                stream.stop()
            conversation = stream.reply.conversation
            if conversation.state.capacity == system.language_model.context:
                break  # it cannot grow
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "picture.png", noise[:rate], rate, "user")
    for seconds in (2, 4, 8, 15):
        mel(np.zeros(seconds * MEL_24K.sample_rate, np.float32))


def _turn(said: Reply, reply: str) -> Turn | None:
    if reply == "speech" and len(said.codes):
        return Turn("assistant", codes=said.codes)
    return Turn("assistant", text=said.text) if said.text.strip() else None


def _load(path: str | Path, most: float, what: str, limits: Limits) -> Recording:
    """A recording that somebody sent. The server's paths stay out of errors and notices.

    Raises:
        MossError: it is too long, cannot be read, or has no speech.
    """
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    if size > limits.upload_bytes:
        most_mb = limits.upload_bytes / 2**20
        raise MossError(f"the {what} has {size / 2**20:.1f} MB, at most {most_mb:.0f} MB are taken; send a shorter one")
    try:
        read = read_audio(path, max_bytes=limits.decoded_bytes, max_seconds=most)
    except MossError as error:
        raise MossError(str(error).replace(str(path), f"the {what}")) from error
    check_speech(read.wave, read.rate, f"the {what}")
    return replace(read, notices=tuple(notice.replace(str(path), f"the {what}") for notice in read.notices))

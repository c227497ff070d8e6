"""One conversation of the demo: questions, streamed answers, and the recordings on disk. Without a browser."""

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.arguments import check_seed
from moss_jax.audio import Recording, check_speech, load_audio, read_audio, save_audio
from moss_jax.audio.features import MEL_24K
from moss_jax.audio.source import RAISE_LIMIT
from moss_jax.dialogue.conversation import Conversation
from moss_jax.dialogue.reply import Piece, Reply, ReplyStream
from moss_jax.dialogue.system import System
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.generate.settings import RANDOM_SETTINGS
from moss_jax.progress import Say, silent
from moss_jax.serve.feed import SpeechFeed
from moss_jax.serve.picture import draw, mel
from moss_jax.speech_decoder.voice import Voice
from moss_jax.speech_tokenizer.encode import SEGMENT_LENGTHS

WARM_SECONDS = 15.0  # after `warm_up`, questions up to this length need no compilation
OWN_VOICE = "my recording"  # in the list of voices: the voice enrolled in this session


@dataclass(frozen=True)
class Limits:
    """Limits of what a client may send, and of what the demo stores for all clients."""

    upload_bytes: int = 25 * 2**20  # of a file
    uploads_bytes: int = 500 * 2**20  # of all uploads together
    upload_seconds: float = 600.0  # how long an unused upload is kept
    decoded_bytes: int = 256 * 2**20  # of a recording: samples x channels x 4
    question_seconds: float = 60.0
    question_characters: int = 4000  # also of the system prompt
    voice_seconds: float = 30.0
    sessions: int = 32
    session_bytes: int = 200 * 2**20  # of the recordings of a conversation
    idle_seconds: float = 3600.0  # an unused session is removed after this time


@dataclass(eq=False)
class Entry:
    """A turn as shown by the page."""

    turn: Turn | None  # for a new prefill when the system turn changes; None: empty
    role: str  # "user" or "assistant"
    text: str = ""
    audio: Path | None = None  # a wav file; its picture is a png file of the same name
    seconds: float = 0.0  # duration of the audio
    first: float | None = None  # s from the question to the first audio, or the first text
    spent: float | None = None  # s from the question to the end of the answer
    notices: tuple[str, ...] = ()

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of computation per second of speech; None without speech."""
        return self.spent / self.seconds if self.spent is not None and self.seconds else None


@dataclass
class _Question:
    entry: Entry
    recording: Recording | None  # None: a written question
    asked: float  # time.perf_counter() of its arrival
    epoch: int  # of the conversation that it belongs to: `clear` begins a new one


@dataclass
class Session:
    """Turns, caches and files of one client.

    `ask` and `enrol` use the model, so only one of them may run at a time; `stop`, `clear` and `close` may be called
    from any thread meanwhile.

    Args:
        system: shared by all sessions.
        folder: of this session; created here, and removed by `close`.
    """

    system: System
    folder: Path
    limits: Limits = field(default_factory=Limits)
    entries: list[Entry] = field(default_factory=list)
    voice: Voice | None = None

    def __post_init__(self) -> None:
        self.key = secrets.token_urlsafe(16)
        self.used = time.monotonic()  # time of the last request
        self.feed: SpeechFeed | None = None  # audio of the latest answer, until it is fetched
        self.folder.mkdir(parents=True)
        self._lock = threading.Lock()  # entries and files, against `clear`
        self._drawing = threading.Lock()  # one picture at a time
        self._epoch = 0
        self._count = 0
        self._stopped = threading.Event()
        self._stream: ReplyStream | None = None
        self._conversation: Conversation | None = None
        self._system_turn: str | None = None

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
    ) -> Generator[Piece]:
        """Appends a question, written or else recorded, to `entries` and answers it.

        Args:
            text: a written question.
            recording: a file with a spoken question, used if there is no text.
            reply: "speech" or "text".
            system_turn: the system prompt; if it differs from the last one, the conversation is prefilled again.
            voice: a name in the system, OWN_VOICE, or None for the default of the system.
            seed: of sampling and noise.
            sampling: keywords of `System.settings`.

        Returns:
            A generator of the pieces of the answer. When it ends, the answer is the last of `entries`.

        Raises:
            MossError: immediately if the question is rejected, from the generator for later errors; the question is
                then removed from `entries`.
        """
        asked = time.perf_counter()
        self.system.settings(**sampling)
        if sampling.get("greedy"):  # otherwise the reply has a notice that they have no effect
            sampling = {name: value for name, value in sampling.items() if name not in RANDOM_SETTINGS}
        if not system_turn.strip():
            raise MossError("the system prompt is empty; write how the assistant should answer")
        _check_length(system_turn, self.limits.question_characters, "system prompt")
        seed = check_seed(seed)
        selected: Voice | str | None = voice
        if voice == OWN_VOICE:
            if self.voice is None:
                raise MossError(
                    "there is no recording of your voice yet; upload or record one, or choose another voice"
                )
            selected = self.voice
        if text is not None:
            question = _Question(self._written(text), None, asked, self._epoch)
        elif recording is None:
            raise MossError("record a question or choose a file first")
        else:
            read = _load(recording, self.limits.question_seconds, "question", self.limits)
            question = _Question(Entry(None, "user", notices=read.notices), read, asked, self._epoch)
            with self._lock:
                kept = sum(path.stat().st_size for path in self.folder.iterdir())
                if kept + 2 * len(read.wave) > self.limits.session_bytes:
                    limit = self.limits.session_bytes / 2**20
                    raise MossError(
                        f"the recordings of this conversation reach the limit of {limit:.0f} MB; clear it and ask again"
                    )
                self._keep_wave(question.entry, read.wave, read.rate)
        self._stopped.clear()
        with self._lock:
            self.entries.append(question.entry)
        return self._answer(question, reply, system_turn, selected, seed, sampling)

    def stop(self) -> None:
        """Ends the answer that is being generated. What was generated stays in the conversation."""
        self._stopped.set()
        if self._stream is not None:
            self._stream.stop()

    def clear(self) -> None:
        """Deletes the conversation and its files. An answer that is being generated ends and is discarded."""
        self.stop()
        with self._lock:
            self._epoch += 1
            self.entries = []
            self._conversation = None
            for path in self.folder.glob("*"):  # empty after `close`
                path.unlink()

    def close(self) -> None:
        """Like `clear`; also removes the folder and the enrolled voice."""
        self.clear()
        self.voice = None
        with self._lock:
            shutil.rmtree(self.folder, ignore_errors=True)

    def enrol(self, recording: str | Path) -> float:
        """Enrols OWN_VOICE from a recording and returns its duration in seconds.

        Raises:
            MossError: the system has no speaker network, or the recording is unusable.
        """
        if not self.system.can_enrol:
            raise MossError("this system cannot enrol voices: it has no speaker network")
        read = _load(recording, self.limits.voice_seconds, "voice recording", self.limits)
        self.voice = self.system.enrol((read.wave, read.rate))
        return len(read.wave) / read.rate

    def file(self, name: str) -> Path | None:
        """The recording or picture of this file name, or None.

        Pictures are drawn lazily, off the path of an answer.
        """
        path = self.folder / Path(name).name
        with self._lock:
            entry = next((entry for entry in self.entries if entry.audio and entry.audio.stem == path.stem), None)
        if entry is None or entry.audio is None or path.suffix not in (".wav", ".png"):
            return None
        if path.suffix == ".wav":
            return path
        with self._drawing:
            if not path.is_file():
                try:
                    draw(path, *load_audio(entry.audio), entry.role)
                except MossError:  # the conversation was cleared meanwhile
                    return None
        with self._lock:
            if entry not in self.entries:
                path.unlink(missing_ok=True)
                return None
        return path

    def _written(self, text: str) -> Entry:
        text = text.strip()
        if not text:
            raise MossError("write a question first")
        _check_length(text, self.limits.question_characters, "question")
        return Entry(Turn("user", text=text), "user", text)

    def _answer(
        self,
        question: _Question,
        reply: str,
        system_turn: str,
        voice: Voice | str | None,
        seed: int,
        sampling: dict[str, Any],
    ) -> Generator[Piece]:
        done = False
        try:
            if question.recording is not None:
                wave = (question.recording.wave, question.recording.rate)
                question.entry.turn = Turn("user", codes=self.system.encode([wave])[0])
            assert question.entry.turn is not None
            if question.epoch != self._epoch:
                return
            conversation = self._conversation
            self._conversation = None  # a conversation can be continued only once
            turns = [question.entry.turn]
            if conversation is None or self._system_turn != system_turn:
                history = [entry.turn for entry in self.entries if entry.turn is not None]  # the question included
                turns = [Turn("system", text=system_turn), *history]
                conversation = None
            stream = self.system.stream(
                turns, reply=reply, voice=voice, conversation=conversation, seed=seed, **sampling
            )
            self._stream = stream
            if self._stopped.is_set():
                stream.stop()
            first = None
            for piece in stream:
                if first is None and (piece.wave.size if reply == "speech" else piece.text):
                    first = time.perf_counter() - question.asked
                yield piece
            done = self._finish(question, stream, reply, first)
            self._system_turn = system_turn
        finally:
            self._stream = None
            if not done:
                self._forget(question)

    def _finish(self, question: _Question, stream: ReplyStream, reply: str, first: float | None) -> bool:
        """Appends the answer to `entries`; False if the conversation was cleared meanwhile."""
        result = stream.reply
        assert result is not None  # the stream has ended
        answer = Entry(
            _turn(result, reply),
            "assistant",
            result.text,
            first=first,
            spent=time.perf_counter() - question.asked,
            notices=result.notices,
        )
        with self._lock:
            if question.epoch != self._epoch:
                return False
            if result.wave is not None and result.wave.size:
                self._keep_wave(answer, result.wave, result.sample_rate)
            self.entries.append(answer)
            self._conversation = result.conversation
        return True

    def _forget(self, question: _Question) -> None:
        """Removes a question without an answer."""
        with self._lock:
            if question.epoch == self._epoch:
                self.entries = [entry for entry in self.entries if entry is not question.entry]
            if question.entry.audio is not None:
                question.entry.audio.unlink(missing_ok=True)

    def _keep_wave(self, entry: Entry, wave: np.ndarray, rate: int) -> None:
        self._count += 1
        entry.audio = self.folder / f"{self._count}-{entry.role}.wav"
        entry.seconds = len(wave) / rate
        save_audio(entry.audio, wave, rate)


def warm_up(system: System, say: Say = silent) -> None:
    """Compiles what the first answers need, so that the first user does not wait for it.

    That is: the encoding of every compiled length up to WARM_SECONDS; spoken and written answers to a question and to a
    following one, each stopped immediately; and the pictures. The second question is long, so that the cache of the
    conversation grows once, if it can.
    """
    say("compiling the speech tokenizer")
    tokenizer = system.speech_tokenizer
    rate = tokenizer.config.sample_rate
    noise = np.random.default_rng(0).normal(0, 0.1, 20 * rate).astype(np.float32)
    for sixteenths in SEGMENT_LENGTHS:
        samples = sixteenths * tokenizer.config.samples_per_segment // 16
        if samples <= WARM_SECONDS * rate:
            tokenizer.encode([noise[:samples]])
    for reply in ("speech", "text"):
        say(f"compiling replies in {reply}")
        conversation = None
        for seconds in (2, 20):
            question = Turn("user", audio=noise[: seconds * rate], sample_rate=rate)
            stream = system.stream([question], reply=reply, conversation=conversation)
            for _ in stream:
                stream.stop()
            assert stream.reply is not None and stream.reply.conversation is not None  # the stream has ended
            conversation = stream.reply.conversation
            if conversation.state.capacity == system.language_model.context:
                break  # the cache cannot grow
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "picture.png", noise[:rate], rate, "user")
    for seconds in (2, 4, 8, 15):
        mel(np.zeros(seconds * MEL_24K.sample_rate, np.float32))


def _turn(result: Reply, reply: str) -> Turn | None:
    """The turn of an answer; None if it is empty."""
    if reply == "speech" and len(result.codes):
        return Turn("assistant", codes=result.codes)
    return Turn("assistant", text=result.text) if result.text.strip() else None


def _check_length(text: str, limit: int, name: str) -> None:
    if len(text) > limit:
        raise MossError(f"the {name} has {len(text)} characters, at most {limit} are taken; shorten it")


def _load(path: str | Path, max_seconds: float, name: str, limits: Limits) -> Recording:
    """Reads an uploaded recording.

    Args:
        name: of the recording in errors and notices, which must not contain paths of the server.

    Raises:
        MossError: it is too long, cannot be read, or has no speech.
    """
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    if size > limits.upload_bytes:
        limit = limits.upload_bytes / 2**20
        raise MossError(f"the {name} has {size / 2**20:.1f} MB, at most {limit:.0f} MB are taken; send a shorter one")
    try:
        read = read_audio(path, max_bytes=limits.decoded_bytes, max_seconds=max_seconds)
    except MossError as error:
        line = str(error).replace(str(path), f"the {name}").replace(RAISE_LIMIT, "send a shorter one")
        raise MossError(line) from error
    check_speech(read.wave, read.rate, f"the {name}")
    return replace(read, notices=tuple(notice.replace(str(path), f"the {name}") for notice in read.notices))

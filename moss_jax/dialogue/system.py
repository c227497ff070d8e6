"""The whole pipeline: recordings and text in, speech and text out.

system = load("FOLDER")
reply = system.reply([Turn("user", audio="QUESTION.wav")])
reply.save("ANSWER.wav")
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_jax.arguments import check_seed, check_whole
from moss_jax.audio import MAX_BYTES, Recording, as_recording, check_speech, read_audio, resample, save_audio
from moss_jax.checkpoint.component import MODEL_FILE
from moss_jax.checkpoint.system_folder import NANO_FOLDER, SYSTEM_FILE, SystemFolder
from moss_jax.dialogue.conversation import Conversation, LanguageModel
from moss_jax.dialogue.grid import read_reply
from moss_jax.dialogue.turns import Turn, check_turns
from moss_jax.dialogue.voice import enrol, load_voice
from moss_jax.errors import MossError, shown
from moss_jax.files import is_file
from moss_jax.generate.loop import GenerationSettings
from moss_jax.generate.sampling import ChannelSettings
from moss_jax.generate.settings import DEFAULTS, RANDOM_SETTINGS, chosen
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_decoder.decoder import SpeechDecoder, check_voice
from moss_jax.speech_decoder.voice import Voice
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.speech_tokenizer.encode import SpeechTokenizer
from moss_jax.text.chat_template import REPLIES
from moss_jax.text.tokenizer import TextStream, TextTokenizer

ROWS = 25  # of a reply between two reports of progress, or two pieces of streamed text
SILENCE = np.zeros(0, np.float32)
Progress = Callable[[int, int], None]  # (rows so far, rows at most)


@dataclass(frozen=True, eq=False)
class Reply:
    """What the assistant says.

    Attributes:
        text: what it writes; usually empty in a spoken reply.
        codes: int32 [N], what it says.
        wave: float32 [samples_per_code * N], or None for a written reply.
        sample_rate: of the wave, Hz.
        complete: False when the reply was cut off by its greatest length.
        notices: one line for each thing that the person should know.
        conversation: to ask on with; None in a batch.
    """

    text: str
    codes: np.ndarray
    wave: np.ndarray | None
    sample_rate: int
    complete: bool
    notices: tuple[str, ...] = ()
    conversation: Conversation | None = None

    def save(self, path: str | Path) -> None:
        """Writes the wave as wav or flac, whole or not at all; MossError when there is nothing to hear."""
        if self.wave is None or not self.wave.size:
            kind = "a written one" if self.wave is None else "one without any speech"
            raise MossError(f"{path}: not written, the reply is {kind}")
        save_audio(path, self.wave, self.sample_rate)


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a streamed reply: text, or a wave float32 [samples]; one of them may be empty."""

    text: str
    wave: np.ndarray


class ReplyStream:
    """An iterator over the pieces of a reply as they come. `reply` is the whole of it once it has ended."""

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
        """Ends the reply with the next piece, from any thread: `reply` is what there is so far, to be asked on from."""
        self._stopped.set()


def generation_settings(**sampling: Any) -> GenerationSettings:
    """Settings of both channels from keywords, the names in `moss_jax.generate.settings.SAMPLING`.

    What is not given has the released driver's value. Raises MossError for an unknown name or a value out of range.
    """
    return _generation_settings(chosen({}, sampling))


def _generation_settings(settings: Mapping[str, Any]) -> GenerationSettings:
    """From all settings, checked."""
    names = ("temperature", "top_p", "repetition_penalty", "top_k", "greedy")
    channel = ChannelSettings(**{name: settings[name] for name in names})
    lengths = {name: settings[name] for name in ("max_new_tokens", "min_new_tokens")}
    return GenerationSettings(text=channel, audio=channel, **lengths)


class System:
    """Language model, ears, voice and voices of one folder, each loaded when it is first needed.

    Args are those of `load`, which loads the language model at once.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        context: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        max_audio_bytes: int = MAX_BYTES,
    ):
        self.folder = SystemFolder(folder)
        self._context = context
        self._mesh = mesh
        self._max_audio_bytes = max_audio_bytes

    @cached_property
    def sampling(self) -> dict[str, Any]:
        """This system's default of each setting in `moss_jax.generate.settings.SAMPLING`: the released driver's, or
        what system.json has under "sampling". Raises MossError when that is not valid."""
        own = self.folder.settings.get("sampling", {})
        where = self.folder.path / SYSTEM_FILE
        if not isinstance(own, dict):
            raise MossError(f"{where}: sampling is {shown(own)}, expected an object with some of {', '.join(DEFAULTS)}")
        try:
            return chosen(own, {})
        except MossError as error:
            raise MossError(f"{where}: sampling: {error}") from error

    def settings(self, **sampling: Any) -> GenerationSettings:
        """The settings of a request that gives these keywords; what it does not give is as in `sampling`.

        A given temperature, top_p or top_k switches the system's own `greedy` off, unless `greedy` is given too.

        Raises:
            MossError: an unknown keyword, a value of another kind or out of range.
        """
        return _generation_settings(chosen(self.sampling, sampling))

    @cached_property
    def language_model(self) -> LanguageModel:
        config, params = self.folder.load(SPEECH_LM, self._mesh)
        text_tokenizer = TextTokenizer.from_file(self.folder.text_tokenizer_path, config)
        return LanguageModel(config, params[MODEL_FILE], text_tokenizer, self._context, self._mesh)

    @cached_property
    def speech_tokenizer(self) -> SpeechTokenizer:
        return SpeechTokenizer.load(self.folder.component_folder("speech_tokenizer"))

    @cached_property
    def speech_decoder(self) -> SpeechDecoder:
        return SpeechDecoder(*self._decoder_parts)

    @cached_property
    def _decoder_parts(self):
        return self.folder.load(SPEECH_DECODER)

    def encode(self, recordings: Sequence[tuple[np.ndarray, int]]) -> list[np.ndarray]:
        """Recordings (wave float32 [samples], rate in Hz) -> speech codes int32 [N] each."""
        rate = self.speech_tokenizer.config.sample_rate
        return self.speech_tokenizer.encode([resample(wave, own, rate) for wave, own in recordings])

    def enrol(self, recording: str | Path | tuple[np.ndarray, int]) -> Voice:
        """A voice from a recording: a file, or (samples as `moss_jax.audio.as_recording` takes them, rate in Hz).

        It may be as long as leaves the speech decoder room for a reply of the system's own max_new_tokens.

        Raises:
            MossError: the system has no speaker network, or the recording cannot be read, has no speech or a length
                that does not fit.
        """
        if isinstance(recording, tuple):
            what = "the recording"
            read = as_recording(*recording, what)
        else:
            what = str(recording)
            read = read_audio(recording, max_bytes=self._max_audio_bytes)
        wave = read.wave
        rate = read.rate
        config, parts = self._decoder_parts
        if config.speaker is None:
            raise MossError(f"{self.folder.path}: this system has one fixed voice, expected no recording of another")
        if "speaker" not in parts:
            raise MossError(f"{self.folder.path}: has no speech_decoder/speaker.safetensors, expected it for a voice")
        check_speech(wave, rate, what)
        try:
            reply_codes = self.sampling["max_new_tokens"]
            return enrol(wave, rate, self.speech_tokenizer, config, parts["speaker"], reply_codes)
        except MossError as error:
            raise error if isinstance(recording, tuple) else MossError(f"{recording}: {error}") from error

    @property
    def can_enrol(self) -> bool:
        """Whether the system can take a voice from a recording: it has a speaker network."""
        config, parts = self._decoder_parts
        return config.speaker is not None and "speaker" in parts

    def voice(self, voice: Voice | str | Path | None = None) -> tuple[Voice, list[str]]:
        """A voice by name, by file or as it is; None is the folder's default. And what there is to say about it."""
        config = self.speech_decoder.config
        if isinstance(voice, Voice):
            check_voice(config, voice)
            return voice, []
        if voice is None:
            voice = self.folder.settings.get("default_voice")
            if voice is None:
                zero = Voice.zero(config.flow.mel_bins, config.flow.speaker_size)
                if config.speaker is None:
                    return zero, []
                return zero, ["no voice was given and the system has no default one: speaking with the zero voice"]
            if not isinstance(voice, str):
                where = self.folder.path / SYSTEM_FILE
                raise MossError(f"{where}: default_voice is {shown(voice)}, expected the name of a voice, or null")
        if str(voice) in self.folder.voices():
            return load_voice(self.folder.voice_path(str(voice)), config), []
        if is_file(voice):
            return load_voice(voice, config), []
        known = ", ".join(self.folder.voices()) or "none"
        raise MossError(f"voice {shown(str(voice))}: neither a file nor a voice of the system, which has: {known}")

    def reply(
        self,
        turns: Sequence[Turn],
        *,
        reply: str = "speech",
        voice: Voice | str | Path | None = None,
        conversation: Conversation | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Reply:
        """The assistant's reply to turns that end with the user's.

        Args:
            turns: without `conversation` the whole conversation so far, the system turn optional; with it what is new.
            reply: "speech" or "text".
            voice: of a spoken reply; a Voice, a name, a file, or None for the system's default.
            conversation: `Reply.conversation` of the reply before; it can be used once.
            seed: 0 to 2**32 - 1; the same seed gives the same reply.
            progress: called now and then with the rows so far and the most there may be.
            sampling: keywords of `settings`; what is not given is as `sampling` says.

        Raises:
            MossError: bad turns, recordings or settings, or a context that is too short. All arguments are checked
                before anything is loaded or computed.
        """
        _check_types(voice, conversation, progress)
        settings, seed, voice, notices = self._prepared(reply, voice, seed, sampling)
        (turns,), (heard,) = self._with_codes([turns])
        notices = [*notices, *heard]
        begun, told = self.language_model.begin(turns, reply, settings, seed=seed, conversation=conversation)
        while True:
            begun = begun.replace(state=self.language_model.go_on(begun.state, settings, ROWS))
            rows, goes_on = self._so_far(begun, settings)
            if progress is not None:
                progress(len(rows), settings.max_new_tokens)
            if not goes_on:
                break
        answer = self._read(rows, reply, not begun.running, settings)
        wave = self._speak(answer.codes, voice, seed) if reply == "speech" else None
        return replace(answer, wave=wave, conversation=begun, notices=(*notices, *told, *answer.notices))

    def stream(
        self,
        turns: Sequence[Turn],
        *,
        reply: str = "speech",
        voice: Voice | str | Path | None = None,
        conversation: Conversation | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> ReplyStream:
        """As `reply`, but in pieces while the rest is still being thought of. The arguments are checked at once."""
        _check_types(voice, conversation)
        settings, seed, voice, notices = self._prepared(reply, voice, seed, sampling)
        (turns,), (heard,) = self._with_codes([turns])
        notices = [*notices, *heard]
        decoder = self.speech_decoder if reply == "speech" else None
        begun, told = self.language_model.begin(turns, reply, settings, seed=seed, conversation=conversation)
        rate = decoder.config.sample_rate if decoder else 0
        stopped = threading.Event()
        pieces = self._pieces(begun, reply, settings, decoder, voice, seed, [*notices, *told], stopped)
        return ReplyStream(pieces, rate, stopped)

    def _pieces(self, begun, reply, settings, decoder, voice, seed, notices, stopped) -> Iterator[Piece | Reply]:
        speech = decoder.stream(voice, seed) if decoder else None
        text = TextStream(self.language_model.text_tokenizer)
        ids_told = 0
        codes_told = 0
        waves = []
        # The first piece of speech needs a chunk and the codes that the decoder looks ahead.
        step = decoder.config.streaming()[1].chunk if decoder else ROWS
        k = step + decoder.config.flow.lookahead if decoder else ROWS
        goes_on = True
        begun = begun.replace(state=self.language_model.go_on(begun.state, settings, k))
        while goes_on:
            rows, goes_on = self._so_far(begun, settings)
            cut = goes_on and stopped.is_set()
            goes_on = goes_on and not cut
            said = read_reply(rows, self.language_model.config)
            wave = SILENCE
            if speech and len(said.codes) > codes_told:
                wave = speech.push(said.codes[codes_told:])
                codes_told = len(said.codes)
            if speech and codes_told and (said.complete or not goes_on):
                wave = np.concatenate([wave, speech.finish()])
                speech = None
            if goes_on:  # the transformer thinks while the listener hears this piece
                begun = begun.replace(state=self.language_model.go_on(begun.state, settings, step))
            waves.append(wave)
            piece = text.push(said.text_ids[ids_told:])
            ids_told = len(said.text_ids)
            if not goes_on:
                piece += text.finish()
            if piece or wave.size:
                yield Piece(piece, wave)
        answer = self._read(rows, reply, not begun.running, settings, cut)
        wave = np.concatenate(waves) if decoder else None
        yield replace(answer, wave=wave, conversation=begun, notices=(*notices, *answer.notices))

    def reply_batch(
        self,
        questions: Sequence[Sequence[Turn]],
        *,
        reply: str = "speech",
        voice: Voice | str | Path | None = None,
        batch_size: int = 8,
        seed: int = 0,
        first_request: int = 0,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Iterator[Reply]:
        """Replies to independent conversations, `batch_size` of them at a time, in their order.

        Arguments are those of `reply`; question i draws as request `first_request` + i of the seed, whatever the batch
        is.
        """
        _check_types(voice, progress=progress)
        batch_size = check_whole("batch_size", batch_size, 1)
        first_request = check_whole("first_request", first_request, 0)
        settings, seed, voice, notices = self._prepared(reply, voice, seed, sampling)
        if not isinstance(questions, Sequence) or isinstance(questions, str):
            raise MossError(f"questions: is {type(questions).__name__}, expected a list of lists of Turns")
        for turns in questions:
            check_turns(turns)
        return self._batches(questions, reply, voice, batch_size, seed, first_request, progress, settings, notices)

    def _batches(
        self, questions, reply, voice, batch_size, seed, first_request, progress, settings, notices
    ) -> Iterator[Reply]:
        for first in range(0, len(questions), batch_size):
            part, heard = self._with_codes(questions[first : first + batch_size])
            state, begin, told = self.language_model.begin_batch(
                part,
                reply,
                settings,
                seed=seed,
                requests=range(first_request + first, first_request + first + len(part)),
                rows=min(batch_size, len(questions)),
            )
            done = 0
            running = True
            while running and done < settings.max_new_tokens:
                state = self.language_model.go_on(state, settings, ROWS)
                done = int(state.step)
                running = bool(np.asarray(state.running).any())
                if progress is not None:
                    progress(done, settings.max_new_tokens)
            grid, lengths, cut = (np.asarray(x) for x in (state.grid, state.lengths, state.running))
            del state
            for row in range(len(part)):
                answer = self._read(grid[row, begin : begin + lengths[row]], reply, not cut[row], settings)
                wave = self._speak(answer.codes, voice, seed) if reply == "speech" else None
                yield replace(answer, wave=wave, notices=(*notices, *heard[row], *told[row], *answer.notices))

    def resume(self, path: str | Path) -> Conversation:
        """A conversation that `Conversation.save` wrote, to ask on with."""
        return self.language_model.resume(path)

    def _prepared(
        self, reply: str, voice: Voice | str | Path | None, seed: int, sampling: Mapping[str, Any]
    ) -> tuple[GenerationSettings, int, Voice | None, list[str]]:
        """The checked arguments of a request: settings, seed, the voice of a spoken reply, and notices. No weights are
        loaded for it."""
        if not isinstance(reply, str) or reply not in REPLIES:
            raise MossError(f"reply: {shown(reply)}, expected one of {', '.join(REPLIES)}")
        settings = self.settings(**sampling)
        seed = check_seed(seed)
        notices = _without_effect(settings, reply, seed, sampling)
        if reply == "text":
            return settings, seed, None, notices
        voice, more = self.voice(voice)
        flow = self.speech_decoder.config.flow
        most = flow.max_codes - len(voice.codes)
        if settings.max_new_tokens > most:
            raise MossError(
                f"max_new_tokens is {settings.max_new_tokens}, expected at most {most} with this voice: the speech "
                f"decoder takes {flow.max_codes} codes, and the voice's recording has {len(voice.codes)}"
            )
        return settings, seed, voice, [*more, *notices]

    def _with_codes(self, questions: Sequence[Sequence[Turn]]) -> tuple[list[list[Turn]], list[list[str]]]:
        """The same conversations, their recordings encoded to codes together, and notices about each one's recordings.

        Raises:
            MossError: a recording cannot be read or has no speech.
        """
        for turns in questions:
            check_turns(turns)
        questions = [list(turns) for turns in questions]
        notices: list[list[str]] = [[] for _ in questions]
        spoken = [(q, i) for q, turns in enumerate(questions) for i, turn in enumerate(turns) if turn.audio is not None]
        recordings = [_recording(questions[q][i], self._max_audio_bytes) for q, i in spoken]
        codes = self.encode([(read.wave, read.rate) for read in recordings]) if spoken else []
        for (q, i), read, part in zip(spoken, recordings, codes, strict=True):
            notices[q].extend(read.notices)
            questions[q][i] = Turn(questions[q][i].role, codes=part)
        return questions, notices

    def _so_far(self, begun: Conversation, settings: GenerationSettings) -> tuple[np.ndarray, bool]:
        """The rows of the reply, and whether more will come. Waits for the device."""
        rows = begun.rows
        room = int(begun.state.filled) < begun.state.capacity
        return rows, begun.running and room and len(rows) < settings.max_new_tokens

    def _read(self, rows, reply: str, ended: bool, settings: GenerationSettings, stopped: bool = False) -> Reply:
        said = read_reply(rows, self.language_model.config)
        notices = []
        if stopped:
            notices.append(f"the reply was stopped after {len(rows)} rows")
        elif not ended:
            notices.append(
                f"the reply was cut off after {len(rows)} rows (max_new_tokens is {settings.max_new_tokens})"
            )
        if reply == "speech" and not len(said.codes):
            notices.append("the reply holds no speech: it ended before the first code")
        rate = self.speech_decoder.config.sample_rate if reply == "speech" else 0
        text = self.language_model.text_tokenizer.decode(said.text_ids)
        return Reply(text, said.codes, None, rate, ended, tuple(notices))

    def _speak(self, codes: np.ndarray, voice: Voice, seed: int) -> np.ndarray:
        return self.speech_decoder.decode(codes, voice, seed) if len(codes) else SILENCE


def load(
    folder: str | Path = NANO_FOLDER,
    *,
    context: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    max_audio_bytes: int = MAX_BYTES,
) -> System:
    """A system from its folder, ready to answer.

    Args:
        folder: nano, which comes with the package, when there is none.
        context: rows that a conversation may have at most; None for what the model was tuned on.
        mesh: lays the language model out over several devices (`moss_jax.sharding.make_mesh`).
        max_audio_bytes: the most decoded samples of a recording that is given as a file (`moss_jax.audio.read_audio`).

    Raises:
        MossError: not a system's folder, or a part of it is missing or damaged.
    """
    system = System(folder, context=context, mesh=mesh, max_audio_bytes=max_audio_bytes)
    _ = system.language_model
    return system


def _check_types(voice: Any, conversation: Any = None, progress: Any = None) -> None:
    """Raises MossError for arguments of a wrong type, and for a conversation that has been used."""
    for name, value, kinds, expected in (
        ("voice", voice, Voice | str | Path | None, "a name, a file or a Voice"),
        ("conversation", conversation, Conversation | None, "that of a reply, or what `resume` returned"),
        ("progress", progress, Callable | None, "a function of two numbers"),
    ):
        if not isinstance(value, kinds):
            raise MossError(f"{name} is {shown(value)}, expected {expected}")
    if conversation is not None:
        conversation.check()


def _without_effect(settings: GenerationSettings, reply: str, seed: int, sampling: Mapping[str, Any]) -> list[str]:
    """A notice for what was given and changes nothing, because the reply is greedy."""
    if not settings.text.greedy:
        return []
    notices = [f"{name} has no effect: the reply is greedy" for name in RANDOM_SETTINGS if name in sampling]
    if seed and reply == "speech":
        notices.append("the seed changes only the noise in the voice: the reply is greedy")
    elif seed:
        notices.append("the seed has no effect: the reply is greedy")
    return notices


def _recording(turn: Turn, max_bytes: int) -> Recording:
    if isinstance(turn.audio, np.ndarray):
        what = f"turn of {turn.role}"
        read = as_recording(turn.audio, turn.sample_rate, what)
    else:
        what = str(turn.audio)
        read = read_audio(turn.audio, max_bytes=max_bytes)
    check_speech(read.wave, read.rate, what)
    return read

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
from moss_jax.audio import MAX_BYTES, Recording, as_recording, check_speech, read_audio, resample
from moss_jax.checkpoint.component import MODEL_FILE, ComponentParams
from moss_jax.checkpoint.system_folder import NANO_FOLDER, SYSTEM_FILE, SystemFolder
from moss_jax.dialogue.conversation import Conversation, LanguageModel
from moss_jax.dialogue.grid import read_reply
from moss_jax.dialogue.reply import Piece, Reply, ReplyStream
from moss_jax.dialogue.turns import Turn, check_turns
from moss_jax.dialogue.voice import enrol, load_voice
from moss_jax.errors import MossError, shown
from moss_jax.files import is_file
from moss_jax.generate.sampling import ChannelSettings, GenerationSettings
from moss_jax.generate.settings import DEFAULTS, RANDOM_SETTINGS, resolve_settings
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.decoder import SpeechDecoder, check_voice
from moss_jax.speech_decoder.voice import Voice
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER
from moss_jax.speech_tokenizer.encode import SpeechTokenizer
from moss_jax.text.chat_template import REPLIES
from moss_jax.text.tokenizer import TextStream, TextTokenizer

ROWS = 25  # generated between two reports of progress, or two pieces of streamed text
SILENCE = np.zeros(0, np.float32)
Progress = Callable[[int, int], None]  # (rows so far, maximum number of rows)


def generation_settings(**sampling: Any) -> GenerationSettings:
    """The settings of both channels from keywords, whose names are in `moss_jax.generate.settings.SAMPLING`.

    Those that are not given are the released driver's.

    Raises:
        MossError: an unknown name, or a value out of range.
    """
    return _generation_settings(resolve_settings({}, sampling))


def _generation_settings(settings: Mapping[str, Any]) -> GenerationSettings:
    """From the values of all settings, which have been checked."""
    names = ("temperature", "top_p", "repetition_penalty", "top_k", "greedy")
    channel = ChannelSettings(**{name: settings[name] for name in names})
    lengths = {name: settings[name] for name in ("max_new_tokens", "min_new_tokens")}
    return GenerationSettings(text=channel, audio=channel, **lengths)


@dataclass(frozen=True)
class _Request:
    """The checked arguments of a request.

    Attributes:
        reply: "speech" or "text".
        voice: of a spoken reply.
        notices: about the arguments.
    """

    reply: str
    settings: GenerationSettings
    seed: int
    voice: Voice | None
    notices: list[str]


class System:
    """The language model, speech tokenizer, speech decoder and voices of a system folder, each loaded on first use.

    The arguments are those of `load`, which loads the language model at once.

    Attributes:
        folder: the SystemFolder.
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
        """This system's default of each setting in `moss_jax.generate.settings.SAMPLING`: the value under "sampling" in
        its system.json, or else the released driver's.

        Raises:
            MossError: system.json has an invalid value.
        """
        defaults = self.folder.settings.get("sampling", {})
        path = self.folder.path / SYSTEM_FILE
        if not isinstance(defaults, dict):
            raise MossError(
                f"{path}: sampling is {shown(defaults)}, expected an object with some of {', '.join(DEFAULTS)}"
            )
        try:
            return resolve_settings(defaults, {})
        except MossError as error:
            raise MossError(f"{path}: sampling: {error}") from error

    def settings(self, **sampling: Any) -> GenerationSettings:
        """The settings of a request with these keywords; those that are not given are as in `sampling`.

        A temperature, top_p or top_k switches off the system's own `greedy`, unless `greedy` is given too.

        Raises:
            MossError: an unknown keyword, or a value of another type or out of range.
        """
        return _generation_settings(resolve_settings(self.sampling, sampling))

    @cached_property
    def language_model(self) -> LanguageModel:
        config, params = self.folder.load(SPEECH_LM, self._mesh)
        text_tokenizer = TextTokenizer.from_file(self.folder.text_tokenizer_path, config)
        return LanguageModel(config, params[MODEL_FILE], text_tokenizer, self._context, self._mesh)

    @cached_property
    def speech_tokenizer(self) -> SpeechTokenizer:
        config, params = self.folder.load(SPEECH_TOKENIZER)
        return SpeechTokenizer(config, params[MODEL_FILE])

    @cached_property
    def speech_decoder(self) -> SpeechDecoder:
        return SpeechDecoder(*self._speech_decoder_params)

    @cached_property
    def _speech_decoder_params(self) -> tuple[SpeechDecoderConfig, ComponentParams]:
        return self.folder.load(SPEECH_DECODER)

    def encode(self, recordings: Sequence[tuple[np.ndarray, int]]) -> list[np.ndarray]:
        """Encodes recordings (wave float32 [samples], rate in Hz) to speech codes int32 [N] each."""
        target = self.speech_tokenizer.config.sample_rate
        return self.speech_tokenizer.encode([resample(wave, rate, target) for wave, rate in recordings])

    def enrol(self, recording: str | Path | tuple[np.ndarray, int]) -> Voice:
        """A voice from a recording: a file, or (samples as for `moss_jax.audio.as_recording`, rate in Hz).

        The speech decoder limits the length of the recording together with a reply of the system's own max_new_tokens.

        Raises:
            MossError: the system has no speaker network, or the recording cannot be read, has no speech, or is too
                short or too long.
        """
        if isinstance(recording, tuple):
            name = "the recording"
            read = as_recording(*recording, name)
        else:
            name = str(recording)
            read = read_audio(recording, max_bytes=self._max_audio_bytes)
        config, params = self._speech_decoder_params
        if config.speaker is None:
            raise MossError(f"{self.folder.path}: this system has one fixed voice, expected no recording of another")
        if "speaker" not in params:
            raise MossError(f"{self.folder.path}: has no speech_decoder/speaker.safetensors, expected it for a voice")
        check_speech(read.wave, read.rate, name)
        try:
            reply_codes = self.sampling["max_new_tokens"]
            return enrol(read.wave, read.rate, self.speech_tokenizer, config, params["speaker"], reply_codes)
        except MossError as error:
            raise error if isinstance(recording, tuple) else MossError(f"{recording}: {error}") from error

    @property
    def can_enrol(self) -> bool:
        """Whether the system can make a voice from a recording: it has a speaker network."""
        config, params = self._speech_decoder_params
        return config.speaker is not None and "speaker" in params

    def voice(self, voice: Voice | str | Path | None = None) -> tuple[Voice, list[str]]:
        """A voice by its name, by its file or as it is; None: the system's default voice. And notices about it.

        Raises:
            MossError: there is no such voice, or it does not fit the speech decoder.
        """
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
                path = self.folder.path / SYSTEM_FILE
                raise MossError(f"{path}: default_voice is {shown(voice)}, expected the name of a voice, or null")
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
            turns: the whole conversation so far, the system turn optional; with `conversation` only the new turns.
            reply: "speech" or "text".
            voice: of a spoken reply: a Voice, a name, a file, or None for the system's default.
            conversation: `Reply.conversation` of the previous reply; each can be continued once.
            seed: 0 to 2**32 - 1; the same seed gives the same reply.
            progress: called repeatedly with the number of rows so far and its maximum.
            sampling: keywords of `settings`; those that are not given are as in `sampling`.

        Raises:
            MossError: invalid turns, recordings or settings, or the context is too short. All arguments are checked
                before anything is loaded or computed.
        """
        _check_types(voice, conversation, progress)
        request = self._request(reply, voice, seed, sampling)
        current, notices = self._begin(turns, request, conversation)
        maximum = request.settings.max_new_tokens
        continues = True
        while continues:
            current = self._decode(current, request.settings, ROWS)
            rows, continues = _rows_so_far(current, request.settings)
            if progress is not None:
                progress(len(rows), maximum)
        answer = self._read_reply(rows, request, complete=not current.running)
        wave = self._speak(answer.codes, request) if reply == "speech" else None
        return replace(answer, wave=wave, conversation=current, notices=(*notices, *answer.notices))

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
        """As `reply`, but in pieces, while the rest is being generated. The arguments are checked at once."""
        _check_types(voice, conversation)
        request = self._request(reply, voice, seed, sampling)
        current, notices = self._begin(turns, request, conversation)
        sample_rate = self.speech_decoder.config.sample_rate if reply == "speech" else 0
        stopped = threading.Event()
        return ReplyStream(self._pieces(current, request, notices, stopped), sample_rate, stopped)

    def _begin(
        self, turns: Sequence[Turn], request: _Request, conversation: Conversation | None
    ) -> tuple[Conversation, list[str]]:
        """The conversation with the turns added, before the first row of the reply, and all notices so far."""
        (coded,), (recording_notices,) = self._with_codes([turns])
        current, model_notices = self.language_model.begin(
            coded, request.reply, request.settings, seed=request.seed, conversation=conversation
        )
        return current, [*request.notices, *recording_notices, *model_notices]

    def _decode(self, conversation: Conversation, settings: GenerationSettings, k: int) -> Conversation:
        """The conversation with up to `k` more rows. Returns before they are computed."""
        return replace(conversation, state=self.language_model.decode(conversation.state, settings, k))

    def _pieces(
        self, current: Conversation, request: _Request, notices: list[str], stopped: threading.Event
    ) -> Iterator[Piece | Reply]:
        decoder = None
        speech = None
        step = ROWS
        first_step = ROWS
        if request.voice is not None:
            decoder = self.speech_decoder
            speech = decoder.stream(request.voice, request.seed)
            # The first piece of speech needs the codes of a chunk and those of the decoder's lookahead.
            step = decoder.config.streaming()[1].chunk
            first_step = step + decoder.config.flow.lookahead
        text = TextStream(self.language_model.text_tokenizer)
        num_ids = 0  # of the text, in the pieces so far
        num_codes = 0
        waves = []
        continues = True
        stopped_early = False
        current = self._decode(current, request.settings, first_step)
        while continues:
            rows, continues = _rows_so_far(current, request.settings)
            stopped_early = continues and stopped.is_set()
            continues = continues and not stopped_early
            content = read_reply(rows, self.language_model.config)
            wave = SILENCE
            if speech is not None and len(content.codes) > num_codes:
                wave = speech.push(content.codes[num_codes:])
                num_codes = len(content.codes)
            if speech is not None and num_codes and (content.complete or not continues):
                wave = np.concatenate([wave, speech.finish()])
                speech = None
            if continues:  # the language model computes the next rows while the listener hears this piece
                current = self._decode(current, request.settings, step)
            waves.append(wave)
            piece = text.push(content.text_ids[num_ids:])
            num_ids = len(content.text_ids)
            if not continues:
                piece += text.finish()
            if piece or wave.size:
                yield Piece(piece, wave)
        answer = self._read_reply(rows, request, complete=not current.running, stopped=stopped_early)
        whole = np.concatenate(waves) if decoder is not None else None
        yield replace(answer, wave=whole, conversation=current, notices=(*notices, *answer.notices))

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
        """Replies to independent conversations in their order, `batch_size` of them at a time.

        The arguments are those of `reply`. The draws of question i are those of request `first_request` + i under the
        seed, whatever the batch size.
        """
        _check_types(voice, progress=progress)
        batch_size = check_whole("batch_size", batch_size, 1)
        first_request = check_whole("first_request", first_request, 0)
        request = self._request(reply, voice, seed, sampling)
        if not isinstance(questions, Sequence) or isinstance(questions, str):
            raise MossError(f"questions: is {type(questions).__name__}, expected a list of lists of Turns")
        for turns in questions:
            check_turns(turns)
        return self._batches(questions, request, batch_size, first_request, progress)

    def _batches(
        self,
        questions: Sequence[Sequence[Turn]],
        request: _Request,
        batch_size: int,
        first_request: int,
        progress: Progress | None,
    ) -> Iterator[Reply]:
        maximum = request.settings.max_new_tokens
        for first in range(0, len(questions), batch_size):
            batch, recording_notices = self._with_codes(questions[first : first + batch_size])
            state, begin, model_notices = self.language_model.begin_batch(
                batch,
                request.reply,
                request.settings,
                seed=request.seed,
                requests=range(first_request + first, first_request + first + len(batch)),
                rows=min(batch_size, len(questions)),
            )
            step = 0
            running = True
            while running and step < maximum:
                state = self.language_model.decode(state, request.settings, ROWS)
                step, rows_running = jax.device_get((state.step, state.running))
                running = bool(rows_running.any())
                if progress is not None:
                    progress(int(step), maximum)
            grid, lengths, cut_off = jax.device_get((state.grid, state.lengths, state.running))
            del state  # frees its memory before the speech is decoded
            for row in range(len(batch)):
                rows = grid[row, begin : begin + lengths[row]]
                answer = self._read_reply(rows, request, complete=not cut_off[row])
                wave = self._speak(answer.codes, request) if request.reply == "speech" else None
                notices = (*request.notices, *recording_notices[row], *model_notices[row], *answer.notices)
                yield replace(answer, wave=wave, notices=notices)

    def resume(self, path: str | Path) -> Conversation:
        """Reads a conversation that `Conversation.save` wrote, to continue it.

        Raises:
            MossError: not such a file, saved with another model, longer than the context, or damaged.
        """
        return self.language_model.resume(path)

    def _request(
        self, reply: str, voice: Voice | str | Path | None, seed: int, sampling: Mapping[str, Any]
    ) -> _Request:
        """Checks the arguments of a request. No weights are loaded for it."""
        if not isinstance(reply, str) or reply not in REPLIES:
            raise MossError(f"reply: {shown(reply)}, expected one of {', '.join(REPLIES)}")
        settings = self.settings(**sampling)
        seed = check_seed(seed)
        notices = _without_effect(settings, reply, seed, sampling)
        if reply == "text":
            return _Request(reply, settings, seed, None, notices)
        found, voice_notices = self.voice(voice)
        flow = self.speech_decoder.config.flow
        maximum = flow.max_codes - len(found.codes)
        if settings.max_new_tokens > maximum:
            raise MossError(
                f"max_new_tokens is {settings.max_new_tokens}, expected at most {maximum} with this voice: the speech "
                f"decoder takes {flow.max_codes} codes, and the voice's recording has {len(found.codes)}"
            )
        return _Request(reply, settings, seed, found, [*voice_notices, *notices])

    def _with_codes(self, questions: Sequence[Sequence[Turn]]) -> tuple[list[list[Turn]], list[list[str]]]:
        """The same conversations with their recordings encoded to codes, all in one batch, and notices about the
        recordings of each.

        Raises:
            MossError: a recording cannot be read or has no speech.
        """
        for turns in questions:
            check_turns(turns)
        coded = [list(turns) for turns in questions]
        notices: list[list[str]] = [[] for _ in questions]
        places = [(q, i) for q, turns in enumerate(coded) for i, turn in enumerate(turns) if turn.audio is not None]
        recordings = [_recording(coded[q][i], self._max_audio_bytes) for q, i in places]
        codes = self.encode([(read.wave, read.rate) for read in recordings]) if places else []
        for (q, i), read, clip in zip(places, recordings, codes, strict=True):
            notices[q].extend(read.notices)
            coded[q][i] = Turn(coded[q][i].role, codes=clip)
        return coded, notices

    def _read_reply(self, rows: np.ndarray, request: _Request, complete: bool, stopped: bool = False) -> Reply:
        """The reply, without its wave, in generated rows int32 [T, 2].

        Args:
            complete: whether it has ended by itself.
            stopped: whether `ReplyStream.stop` ended it.
        """
        content = read_reply(rows, self.language_model.config)
        notices = []
        if stopped:
            notices.append(f"the reply was stopped after {len(rows)} rows")
        elif not complete:
            maximum = request.settings.max_new_tokens
            notices.append(f"the reply was cut off after {len(rows)} rows (max_new_tokens is {maximum})")
        if request.reply == "speech" and not len(content.codes):
            notices.append("the reply holds no speech: it ended before the first code")
        sample_rate = self.speech_decoder.config.sample_rate if request.reply == "speech" else 0
        text = self.language_model.text_tokenizer.decode(content.text_ids)
        return Reply(text, content.codes, None, sample_rate, complete, tuple(notices))

    def _speak(self, codes: np.ndarray, request: _Request) -> np.ndarray:
        assert request.voice is not None  # a spoken reply
        return self.speech_decoder.decode(codes, request.voice, request.seed) if len(codes) else SILENCE


def load(
    folder: str | Path = NANO_FOLDER,
    *,
    context: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    max_audio_bytes: int = MAX_BYTES,
) -> System:
    """Loads a system from its folder, ready to answer.

    Args:
        folder: by default that of nano, the model that is part of the package.
        context: maximum number of rows of a conversation; None: what the model was trained for.
        mesh: shards the language model over several devices (`moss_jax.sharding.make_mesh`).
        max_audio_bytes: maximum size of the decoded samples of a recording file (`moss_jax.audio.read_audio`).

    Raises:
        MossError: not a system folder, or a component of it is missing or damaged.
    """
    system = System(folder, context=context, mesh=mesh, max_audio_bytes=max_audio_bytes)
    _ = system.language_model  # loads it now
    return system


def _rows_so_far(conversation: Conversation, settings: GenerationSettings) -> tuple[np.ndarray, bool]:
    """The rows int32 [T, 2] of the latest reply, and whether it continues. Waits for the device."""
    rows, running, full = conversation.progress()
    return rows, running and not full and len(rows) < settings.max_new_tokens


def _check_types(voice: Any, conversation: Any = None, progress: Any = None) -> None:
    """Raises MossError for arguments of a wrong type, and for a conversation that has been continued already."""
    for name, value, kinds, expected in (
        ("voice", voice, (Voice, str, Path), "a name, a file or a Voice"),
        ("conversation", conversation, (Conversation,), "that of a reply, or what `resume` returned"),
    ):
        if value is not None and not isinstance(value, kinds):
            raise MossError(f"{name} is {shown(value)}, expected {expected}")
    if progress is not None and not callable(progress):
        raise MossError(f"progress is {shown(progress)}, expected a function of two numbers")
    if conversation is not None:
        conversation.check()


def _without_effect(settings: GenerationSettings, reply: str, seed: int, sampling: Mapping[str, Any]) -> list[str]:
    """Notices for arguments that change nothing, because the reply is greedy."""
    if not settings.text.greedy:
        return []
    notices = [f"{name} has no effect: the reply is greedy" for name in RANDOM_SETTINGS if name in sampling]
    if seed and reply == "speech":
        notices.append("the seed changes only the noise in the voice: the reply is greedy")
    elif seed:
        notices.append("the seed has no effect: the reply is greedy")
    return notices


def _recording(turn: Turn, max_bytes: int) -> Recording:
    """The recording of a turn, read and checked for speech."""
    assert turn.audio is not None
    if isinstance(turn.audio, np.ndarray):
        name = f"turn of {turn.role}"
        read = as_recording(turn.audio, turn.sample_rate, name)
    else:
        name = str(turn.audio)
        read = read_audio(turn.audio, max_bytes=max_bytes)
    check_speech(read.wave, read.rate, name)
    return read

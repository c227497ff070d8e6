"""The sequence formats of training: a document becomes rows of the grid with loss weights.

A row is scored in its own channel only: a text row (im_end, sosp and endoftext are text rows) by the text branch, a
code or eosp by the audio branch. The weight of a row is that of predicting it; it is 0 for the first row of a sequence
and for every row of a prompt. Source: language model specification, section 7.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moss_jax.data.manifest import Document, Word
from moss_jax.dialogue.grid import speech_rows, template_rows, text_rows, turn_rows, with_default_system
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.text.tokenizer import SPECIAL_STRINGS, TextTokenizer

PIECE_SECONDS = (3.0, 6.0)  # the shortest and longest piece of an interleaved document
CUT_SHARE = (0.25, 0.75)  # range of the share of a continued document that is the prompt

Codes = Sequence[np.ndarray | None]  # of each turn of a document, or of its recording; None: a written turn
Rows = tuple[np.ndarray, np.ndarray]  # grid int32 [T, 2] and loss weights float32 [T, 2]


@dataclass(frozen=True, eq=False)
class Example:
    """One document in one format, neither cut nor padded.

    Attributes:
        grid: int32 [T, 2], text id and audio id of each row.
        loss_weights: float32 [T, 2], weight of the loss of predicting this row in each channel; 0 in row 0.
        name: of the document, for error messages.
    """

    grid: np.ndarray
    loss_weights: np.ndarray
    name: str = ""

    def check(self) -> "Example":
        """Returns the example itself; raises MossError if the arrays do not fit together."""
        T = len(self.grid)
        valid = (
            T > 0
            and self.grid.shape == self.loss_weights.shape == (T, 2)
            and self.grid.dtype == np.int32
            and self.loss_weights.dtype == np.float32
        )
        if not valid:
            raise MossError(
                f"example {self.name!r}: grid {list(self.grid.shape)} {self.grid.dtype} and loss_weights "
                f"{list(self.loss_weights.shape)} {self.loss_weights.dtype}, expected int32 and float32 [T, 2], T > 0"
            )
        if self.loss_weights[0].any():
            raise MossError(
                f"example {self.name!r}: its first row has a loss weight, but there is nothing to predict it from"
            )
        return self


def target_weights(grid: np.ndarray, config: SpeechLMConfig, begin: int = 1) -> np.ndarray:
    """Weights float32 [T, 2] of 1 for every row from `begin` on, in its own channel."""
    weights = np.zeros(grid.shape, np.float32)
    is_audio_row = grid[:, 0] == config.modality_pad_id
    weights[np.arange(len(grid)), is_audio_row.astype(int)] = 1
    weights[: max(begin, 1)] = 0
    return weights


def text(ids: Sequence[int], config: SpeechLMConfig) -> Rows:
    """A written document: its ids, endoftext."""
    return _all_scored([text_rows(ids, config)], config)


def speech(codes: np.ndarray, config: SpeechLMConfig) -> Rows:
    """A spoken document: sosp, codes, eosp, endoftext."""
    return _all_scored([speech_rows(codes, config)], config)


def interleaved(pieces: Sequence[Sequence[int] | np.ndarray], config: SpeechLMConfig, spoken_first: bool) -> Rows:
    """Pieces of one document in order, codes and text ids in turn; endoftext."""
    rows = [
        speech_rows(piece, config) if (number % 2 == 0) == spoken_first else text_rows(list(piece), config)
        for number, piece in enumerate(pieces)
    ]
    return _all_scored(rows, config)


def continuation(codes: np.ndarray, cut: int, config: SpeechLMConfig) -> Rows:
    """A spoken document whose first `cut` codes are the prompt; the other codes, eosp and endoftext are scored."""
    grid, _ = speech(codes, config)
    return grid, target_weights(grid, config, 1 + cut)


def chat(turns: Sequence[Turn], text_tokenizer: TextTokenizer, config: SpeechLMConfig) -> Rows:
    """A conversation in which the assistant's replies and the im_end after each are scored.

    Nothing else is: neither the sosp that opens a spoken reply (at inference it is in the prompt), nor the line break
    after im_end.
    """
    parts = []
    scored = []
    for turn in turns:
        rows = turn_rows(turn, text_tokenizer, config)
        mask = np.zeros(len(rows), bool)
        if turn.role == "assistant":
            header = len(template_rows(f"{SPECIAL_STRINGS['im_start_id']}assistant\n", text_tokenizer, config))
            end = len(template_rows(f"{SPECIAL_STRINGS['im_end_id']}\n", text_tokenizer, config)) - 1
            mask[header + (turn.codes is not None) : len(rows) - end] = True
        parts.append(rows)
        scored.append(mask)
    grid = np.concatenate(parts)
    return grid, target_weights(grid, config) * np.concatenate(scored)[:, None].astype(np.float32)


def _all_scored(rows: list[np.ndarray], config: SpeechLMConfig) -> Rows:
    grid = np.concatenate([*rows, text_rows([config.endoftext_id], config)])
    return grid, target_weights(grid, config)


@dataclass(frozen=True)
class ExampleBuilder:
    """Makes examples of documents whose recordings have been encoded.

    Attributes:
        format: one of FORMATS.
        config: of the model that is trained.
        text_tokenizer: of the same model; None for formats without text.
        code_rate: codes per second, to convert word times.
        seed: of random cuts. The cuts of a document depend on the seed, its name and the variant alone.
        system: content of a system turn, for asr, tts and chat. None: asr and tts have no system turn, and a chat that
            does not begin with one gets the default for its last reply, as in generation.
    """

    format: str
    config: SpeechLMConfig
    text_tokenizer: TextTokenizer | None
    code_rate: float = 12.5
    seed: int = 0
    system: str | None = None

    def example(self, document: Document, codes: Codes, variant: int = 0) -> Example:
        """One variant of a document.

        Args:
            codes: of the document's recording; for a conversation one entry per turn (None: a written turn).
            variant: variants differ in their random cuts; formats without cuts have one variant.

        Raises:
            MossError: the document cannot have this format.
        """
        grid, weights = _FORMATS[self.format](self, document, codes, self._random(document, variant))
        return Example(grid, weights, document.name if variant == 0 else f"{document.name}/{variant}")

    def _random(self, document: Document, variant: int) -> np.random.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{variant}/{document.name}".encode(), digest_size=16).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def _text(self, document: Document, codes: Codes, random: np.random.Generator) -> Rows:
        return text(self._encode(document.text), self.config)

    def _speech(self, document: Document, codes: Codes, random: np.random.Generator) -> Rows:
        return speech(_only(codes), self.config)

    def _interleaved(self, document: Document, codes: Codes, random: np.random.Generator) -> Rows:
        assert document.text is not None and document.words is not None  # the manifest was checked for them
        recording = _only(codes)
        pieces = cut_interleaved(document.text, document.words, len(recording), self.code_rate, random)
        spoken_first = bool(random.integers(2))
        contents = [
            recording[begin:end] if (number % 2 == 0) == spoken_first else self._encode(words)
            for number, (words, begin, end) in enumerate(pieces)
        ]
        return interleaved(contents, self.config, spoken_first)

    def _continuation(self, document: Document, codes: Codes, random: np.random.Generator) -> Rows:
        recording = _only(codes)
        count = len(recording)
        if count < 2:
            raise MossError(f"its recording has {count} codes, expected at least 2, to cut it in two")
        cut = int(np.clip(round(count * random.uniform(*CUT_SHARE)), 1, count - 1))
        return continuation(recording, cut, self.config)

    def _asr(self, document: Document, codes: Codes, random: np.random.Generator) -> Rows:
        return self._pair(Turn("user", codes=_only(codes)), Turn("assistant", text=document.text))

    def _tts(self, document: Document, codes: Codes, random: np.random.Generator) -> Rows:
        return self._pair(Turn("user", text=document.text), Turn("assistant", codes=_only(codes)))

    def _pair(self, *turns: Turn) -> Rows:
        system = [Turn("system", text=self.system)] if self.system else []
        return self._conversation([*system, *turns])

    def _chat(self, document: Document, codes: Codes, random: np.random.Generator) -> Rows:
        turns = [
            turn if turn_codes is None else Turn(turn.role, codes=turn_codes)
            for turn, turn_codes in zip(document.turns, codes, strict=True)
        ]
        if self.system and turns[0].role != "system":
            turns.insert(0, Turn("system", text=self.system))
        spoken = next(turn for turn in reversed(turns) if turn.role == "assistant").codes is not None
        turns = with_default_system(turns, "speech" if spoken else "text")
        return self._conversation(turns)

    def _conversation(self, turns: Sequence[Turn]) -> Rows:
        assert self.text_tokenizer is not None, f"the format {self.format} needs a text tokenizer"
        return chat(turns, self.text_tokenizer, self.config)

    def _encode(self, text: str | None) -> list[int]:
        assert text is not None  # the manifest was checked for it
        assert self.text_tokenizer is not None, f"the format {self.format} needs a text tokenizer"
        return self.text_tokenizer.encode(text)


def _only(codes: Codes) -> np.ndarray:
    """The codes of a document with one recording."""
    recording = codes[0]
    assert recording is not None
    return recording


_FORMATS: dict[str, Callable[[ExampleBuilder, Document, Codes, np.random.Generator], Rows]] = {
    "text": ExampleBuilder._text,
    "speech": ExampleBuilder._speech,
    "interleaved": ExampleBuilder._interleaved,
    "continuation": ExampleBuilder._continuation,
    "asr": ExampleBuilder._asr,
    "tts": ExampleBuilder._tts,
    "chat": ExampleBuilder._chat,
}


def cut_interleaved(
    text: str, words: Sequence[Word], code_count: int, code_rate: float, random: np.random.Generator
) -> list[tuple[str, int, int]]:
    """Cuts a recording and its transcript at the same word boundaries into pieces of 3 to 6 s, of random lengths.

    A boundary is midway between two words. A piece is longer than 6 s only if there is no boundary in time; the last
    may be shorter than 3 s. Every character and every code belongs to exactly one piece; white space to the piece
    after it, punctuation to the piece before.

    Returns:
        [(text, first code, code after the last)] of each piece.
    """
    seconds = code_count / code_rate
    if words[-1].start >= seconds:
        raise MossError(
            f"the word {words[-1].text!r} starts at {words[-1].start:g} s, the recording ends at {seconds:g} s"
        )
    times = np.array([0.0, *((a.end + b.start) / 2 for a, b in pairwise(words)), seconds])
    times = np.minimum(times, seconds)
    codes = np.clip(np.round(times * code_rate), 0, code_count).astype(int)
    codes[-1] = code_count
    characters = [0, *_text_boundaries(text, words), len(text)]
    cuts = [0]
    cut = 0
    last = len(words)
    while cut < last:
        cut = _next_cut(times, cut, random.uniform(*PIECE_SECONDS))
        if codes[last] - codes[cut] < 1:  # no code would be left for the last piece
            cut = last
        cuts.append(cut)
    return [(text[characters[a] : characters[b]], int(codes[a]), int(codes[b])) for a, b in pairwise(cuts)]


def _next_cut(times: np.ndarray, cut: int, length: float) -> int:
    """The boundary nearest to `length` seconds after boundary `cut`, out of those 3 to 6 s after it.

    If there is none, the first boundary more than 6 s after it, or the last boundary.
    """
    seconds = times[cut + 1 :] - times[cut]
    candidates = np.flatnonzero((seconds >= PIECE_SECONDS[0]) & (seconds <= PIECE_SECONDS[1]))
    if candidates.size:
        return cut + 1 + int(candidates[np.argmin(np.abs(seconds[candidates] - length))])
    later = np.flatnonzero(seconds > PIECE_SECONDS[1])
    return cut + 1 + int(later[0]) if later.size else len(times) - 1


def _text_boundaries(text: str, words: Sequence[Word]) -> list[int]:
    """The character at which the text may be cut between each word and the next."""
    boundaries = []
    end = 0
    for word in words:
        start = text.index(word.text, end)  # the manifest was checked for this
        if word is not words[0]:
            gap = text[end:start]
            boundaries.append(end + next((i for i, letter in enumerate(gap) if letter.isspace()), len(gap)))
        end = start + len(word.text)
    return boundaries

"""Turns to rows of the two-channel grid [T, 2], and back. Channel 0 is text, channel 1 audio.

A turn consists of three pieces that are tokenized separately, so that no merge crosses their borders:
`<|im_start|>{role}\\n`, the content, and `<|im_end|>\\n`. A text row is (id, audio_pad). Speech of N codes takes N + 2
rows: (sosp, audio_pad), then N times (modality_pad, code), then (modality_pad, eosp). Source: the released processor
(fnlp/MOSS-Speech), as described by two public ports of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT, TURN_END, check_reply, reply_start, turn_start
from moss_jax.text.tokenizer import TextTokenizer


def text_rows(ids: Sequence[int], config: SpeechLMConfig) -> np.ndarray:
    """Text ids [T] to rows int32 [T, 2]."""
    return np.stack([np.asarray(ids, np.int32), np.full(len(ids), config.audio_pad_id, np.int32)], 1)


def speech_rows(codes: Sequence[int] | np.ndarray, config: SpeechLMConfig) -> np.ndarray:
    """Speech codes [N] to rows int32 [N + 2, 2].

    Raises:
        MossError: a value is not a speech code.
    """
    codes = np.asarray(codes, np.int64).reshape(-1)
    wrong = codes[(codes < 0) | (codes >= config.eosp_id)]
    if wrong.size:
        raise MossError(f"codes: {wrong[0]} is not a speech code, expected 0 to {config.eosp_id - 1}")
    rows = np.full((len(codes) + 2, 2), config.modality_pad_id, np.int32)
    rows[0] = (config.sosp_id, config.audio_pad_id)
    rows[1:-1, 1] = codes
    rows[-1, 1] = config.eosp_id
    return rows


def template_rows(piece: str, text_tokenizer: TextTokenizer, config: SpeechLMConfig) -> np.ndarray:
    """A piece of the chat template to rows int32 [T, 2]."""
    return text_rows(text_tokenizer.encode_template(piece), config)


def turn_rows(turn: Turn, text_tokenizer: TextTokenizer, config: SpeechLMConfig) -> np.ndarray:
    """A turn of text or codes to rows int32 [T, 2].

    Raises:
        MossError: the turn is a recording, or a code is out of range.
    """
    if turn.codes is not None:
        content = speech_rows(turn.codes, config)
    elif turn.text is not None:
        content = text_rows(text_tokenizer.encode(turn.text), config)
    else:
        raise MossError(f"turn of {turn.role}: audio must be encoded to codes before it can enter a grid")
    start = template_rows(turn_start(turn.role), text_tokenizer, config)
    end = template_rows(TURN_END, text_tokenizer, config)
    return np.concatenate([start, content, end])


def reply_header(reply: str, text_tokenizer: TextTokenizer, config: SpeechLMConfig) -> np.ndarray:
    """The rows int32 [T, 2] that request a reply, "speech" or "text"; for speech the last one is (sosp, audio_pad).

    Raises:
        MossError: any other `reply`.
    """
    return template_rows(reply_start(reply), text_tokenizer, config)


def with_default_system(turns: Sequence[Turn], reply: str) -> list[Turn]:
    """The turns of a new conversation: those given, after the default system turn unless they start with one.

    Raises:
        MossError: `reply` is neither "speech" nor "text".
    """
    check_reply(reply)
    if turns and turns[0].role == "system":
        return list(turns)
    return [Turn("system", text=DEFAULT_SYSTEM_PROMPT[reply]), *turns]


def prompt_pieces(
    turns: Sequence[Turn], reply: str, text_tokenizer: TextTokenizer, config: SpeechLMConfig
) -> list[np.ndarray]:
    """The rows int32 [T, 2] of each turn (text or codes), and last the rows that request the reply."""
    pieces = [turn_rows(turn, text_tokenizer, config) for turn in turns]
    return [*pieces, reply_header(reply, text_tokenizer, config)]


def prompt_grid(turns: Sequence[Turn], reply: str, text_tokenizer: TextTokenizer, config: SpeechLMConfig) -> np.ndarray:
    """The whole prompt int32 [T, 2] of a new conversation (text and codes), with its system turn and reply header."""
    return np.concatenate(prompt_pieces(with_default_system(turns, reply), reply, text_tokenizer, config))


def pad_left(grids: Sequence[np.ndarray], config: SpeechLMConfig) -> tuple[np.ndarray, np.ndarray]:
    """Grids [T_b, 2] to one batch int32 [B, T, 2] and its mask bool [B, T]; padding is (endoftext, audio_pad)."""
    length = max(len(grid) for grid in grids)
    batch = np.empty((len(grids), length, 2), np.int32)
    batch[:] = (config.endoftext_id, config.audio_pad_id)
    valid = np.zeros((len(grids), length), bool)
    for row, grid in enumerate(grids):
        start = length - len(grid)
        batch[row, start:] = grid
        valid[row, start:] = True
    return batch, valid


class ReplyRows(NamedTuple):
    """The content of generated rows.

    Attributes:
        text_ids: of the text rows, special ids included.
        codes: int32 [N], the speech before its first eosp.
        complete: whether there is an eosp.
    """

    text_ids: list[int]
    codes: np.ndarray
    complete: bool


def read_reply(rows: np.ndarray, config: SpeechLMConfig) -> ReplyRows:
    """The text and the first stretch of speech in generated rows int32 [T, 2]."""
    is_speech = rows[:, 0] == config.modality_pad_id
    values = rows[is_speech, 1]
    ends = np.flatnonzero(values == config.eosp_id)
    codes = values[: ends[0]] if ends.size else values
    return ReplyRows(rows[~is_speech, 0].tolist(), codes.astype(np.int32), bool(ends.size))

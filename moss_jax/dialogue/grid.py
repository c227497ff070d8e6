"""Turns <-> the two-channel grid `[rows, 2]` (channel 0 text, channel 1 audio) that the transformer reads.

Every turn becomes three pieces, tokenised apart so that no merge crosses them: `<|im_start|>{role}\n`, the content,
`<|im_end|>\n`. A text row is (id, audio_pad). Speech of N codes takes N + 2 rows: (sosp, audio_pad), then N times
(modality_pad, code), then (modality_pad, eosp). Source: the released
processor (fnlp/MOSS-Speech), as two public ports describe it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT, TURN_END, check_reply, reply_start, turn_start
from moss_jax.text.tokenizer import TextTokenizer

# The one that the released processor inserts. The released driver never lets it come to that.
COMPAT_SYSTEM = {
    "speech": "You are a helpful assistant. Respond with spoken outputs.",
    "text": "You are a helpful assistant. Respond with text outputs.",
}


def text_rows(ids: Sequence[int], config) -> np.ndarray:
    """Ids of the text channel [N] -> rows [N, 2]."""
    return np.stack([np.asarray(ids, np.int32), np.full(len(ids), config.audio_pad_id, np.int32)], 1)


def speech_rows(codes: Sequence[int] | np.ndarray, config) -> np.ndarray:
    """Codes [N] -> rows [N + 2, 2]; raises MossError for what is not a code."""
    codes = np.asarray(codes, np.int64).reshape(-1)
    wrong = codes[(codes < 0) | (codes >= config.eosp_id)]
    if wrong.size:
        raise MossError(f"codes: {wrong[0]} is not a speech code, expected 0 to {config.eosp_id - 1}")
    rows = np.full((len(codes) + 2, 2), config.modality_pad_id, np.int32)
    rows[0] = config.sosp_id, config.audio_pad_id
    rows[1:-1, 1] = codes
    rows[-1, 1] = config.eosp_id
    return rows


def turn_rows(turn: Turn, text_tokenizer: TextTokenizer, config, compat: bool = False) -> np.ndarray:
    """One turn with text or codes -> rows [N, 2]. In `compat` special strings in its text act as special tokens."""
    if turn.codes is not None:
        content = speech_rows(turn.codes, config)
    elif turn.text is not None:
        encode = text_tokenizer.encode_template if compat else text_tokenizer.encode
        content = text_rows(encode(turn.text), config)
    else:
        raise MossError(f"turn of {turn.role}: audio must be encoded to codes before it can enter a grid")
    return np.concatenate(
        [
            template_rows(turn_start(turn.role), text_tokenizer, config),
            content,
            template_rows(TURN_END, text_tokenizer, config),
        ]
    )


def template_rows(piece: str, text_tokenizer: TextTokenizer, config) -> np.ndarray:
    """A piece of the chat template -> rows [N, 2]."""
    return text_rows(text_tokenizer.encode_template(piece), config)


def reply_header(reply: str, text_tokenizer: TextTokenizer, config) -> np.ndarray:
    """The rows that ask the assistant for a reply, "speech" or "text"; for speech the last one is (sosp, audio_pad)."""
    return template_rows(reply_start(reply), text_tokenizer, config)


def with_default_system(turns: Sequence[Turn], reply: str, compat: bool = False) -> list[Turn]:
    """The turns of a new conversation, the default system turn in front unless they begin with one.

    In `compat` it is the released processor's and comes after all turns, as that processor has it.
    """
    check_reply(reply)
    turns = list(turns)
    if turns and turns[0].role == "system":
        return turns
    if compat:
        return [*turns, Turn("system", text=COMPAT_SYSTEM[reply])]
    return [Turn("system", text=DEFAULT_SYSTEM_PROMPT[reply]), *turns]


def prompt_pieces(
    turns: Sequence[Turn], reply: str, text_tokenizer: TextTokenizer, config, compat: bool = False
) -> list[np.ndarray]:
    """Turns of text and codes, and the request for a reply -> rows int32 [N, 2] of each turn, then of the request."""
    pieces = [turn_rows(turn, text_tokenizer, config, compat) for turn in turns]
    return [*pieces, reply_header(reply, text_tokenizer, config)]


def prompt_grid(
    turns: Sequence[Turn], reply: str, text_tokenizer: TextTokenizer, config, compat: bool = False
) -> np.ndarray:
    """A new conversation (text and codes) and the request for a reply -> rows int32 [L, 2]."""
    turns = with_default_system(turns, reply, compat)
    return np.concatenate(prompt_pieces(turns, reply, text_tokenizer, config, compat))


def pad_left(grids: Sequence[np.ndarray], config) -> tuple[np.ndarray, np.ndarray]:
    """Grids [L_b, 2] -> one batch int32 [B, L, 2] and its mask bool [B, L]; padding is (endoftext, audio_pad)."""
    length = max(len(grid) for grid in grids)
    batch = np.empty((len(grids), length, 2), np.int32)
    batch[:] = config.endoftext_id, config.audio_pad_id
    valid = np.zeros((len(grids), length), bool)
    for row, (grid, mask) in enumerate(zip(grids, valid, strict=True)):
        batch[row, length - len(grid) :] = grid
        mask[length - len(grid) :] = True
    return batch, valid


def positions_of(valid):
    """Positions [B, S] of the columns of a mask [B, S]: real ones count from 0, padding has 1. numpy or jax."""
    positions = valid.cumsum(-1) - 1
    return positions * valid + ~valid


class ReplyRows(NamedTuple):
    """What a generated grid says. `codes` int32 [N] end before the first eosp; `complete` tells if there is one."""

    text_ids: list[int]
    codes: np.ndarray
    complete: bool


def read_reply(rows: np.ndarray, config) -> ReplyRows:
    """Generated rows [T, 2] -> the ids of their text rows and the codes of their first stretch of speech."""
    spoken = rows[:, 0] == config.modality_pad_id
    values = rows[spoken, 1]
    ends = np.flatnonzero(values == config.eosp_id)
    codes = values[: ends[0]] if ends.size else values
    return ReplyRows(rows[~spoken, 0].tolist(), codes.astype(np.int32), bool(ends.size))

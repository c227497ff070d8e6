"""Conversations with the language model alone: turns of text and codes in, rows of the reply out.

A conversation keeps its caches from turn to turn, so that a question costs only its own rows. When the context is full,
the oldest turns after the system turn go, and what is left passes the model once more.
"""

import contextlib
import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moss_jax.dialogue.grid import pad_left, prompt_pieces, template_rows, with_default_system
from moss_jax.dialogue.saved import FORMAT, FORMAT_1, TURNS, fingerprint_1, read_conversation, write_conversation
from moss_jax.dialogue.turns import ROLES, Turn
from moss_jax.errors import MossError
from moss_jax.generate.loop import (
    GenerationSettings,
    GenerationState,
    decode_chunk,
    emptied,
    new_state,
    prefill,
    with_capacity,
)
from moss_jax.generate.sampling import request_keys
from moss_jax.generate.state_machine import AUDIO, next_mode
from moss_jax.nn.fingerprint import fingerprint
from moss_jax.nn.precision import in_32_bits
from moss_jax.nn.tree import flatten
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.text.chat_template import TURN_END
from moss_jax.text.tokenizer import TextTokenizer

CONTEXT = 10240  # rows; the longest examples that the released model was tuned on
SMALLEST = 256  # columns; capacities are powers of two from here


@struct.dataclass
class Conversation:
    """A conversation between two replies, as one pytree.

    Asking moves its buffers on into the next one, so that each can be used once; `save` it to go on from here twice.
    """

    state: GenerationState  # of one row
    starts: np.ndarray  # int32 [turns], the column in which each turn begins, the latest reply included
    roles: np.ndarray  # int32 [turns], index in ROLES
    replies: np.ndarray  # int32 [], how many there are, the latest included
    begin: np.ndarray  # int32 [], first column that was generated for the latest reply
    language_model: "LanguageModel" = struct.field(pytree_node=False)  # whose caches they are

    @property
    def rows(self) -> np.ndarray:
        """What the latest reply has so far, int32 [T, 2]."""
        length = np.asarray(self.state.lengths)[0]
        return np.asarray(self.state.grid)[0, self.begin : self.begin + length]

    @property
    def running(self) -> bool:
        """Whether the latest reply has not ended by itself."""
        return bool(np.asarray(self.state.running)[0])

    def check(self) -> None:
        """Raises MossError when the conversation has already gone on."""
        if getattr(self.state.grid, "is_deleted", bool)():
            raise MossError("conversation: it has already gone on; take the one of the latest reply, or a saved one")

    @in_32_bits
    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all; `System.resume` reads it."""
        self.check()
        turns = {name: getattr(self, name) for name in TURNS}
        write_conversation(path, self.state, turns, self.language_model.fingerprint)


class LanguageModel:
    """The transformer with its text tokenizer: `begin` a reply, then let it `go_on`.

    Args:
        config, params: of LayerSplitModel; params are nested.
        context: rows that a conversation may have, replies included; None for what the model was made for.
        mesh: the devices that params lie on; None for one device.
    """

    def __init__(
        self,
        config: SpeechLMConfig,
        params: Any,
        text_tokenizer: TextTokenizer,
        context: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config = config
        self.params = params
        self.text_tokenizer = text_tokenizer
        self.mesh = mesh
        self.context = min(CONTEXT, config.max_position_embeddings) if context is None else context
        if not 0 < self.context <= config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise MossError(f"context: {self.context} rows, expected 1 to the model's {limit}")

    @functools.cached_property
    @in_32_bits
    def fingerprint(self) -> str:
        """By which saved conversations know the weights: it changes with any bit of them, and with what else decides
        the values in the caches."""
        rest = (self.config.rope_theta, self.config.rms_norm_eps)
        return f"{fingerprint(flatten(self.params)):08x}-{zlib.crc32(repr(rest).encode()):08x}"

    @in_32_bits
    def begin(
        self,
        turns: Sequence[Turn],
        reply: str,
        settings: GenerationSettings,
        *,
        seed: int = 0,
        request: int = 0,
        conversation: Conversation | None = None,
    ) -> tuple[Conversation, list[str]]:
        """Says `turns` (text and codes) and opens a reply, of which nothing is generated yet.

        Args:
            reply: "speech" or "text".
            seed, request: key the draws.
            conversation: goes on from here (and can then be used no more); None begins a new one, with the released
                driver's system turn unless `turns` has one.

        Returns:
            The conversation, and notices: one line for each thing that the person should know.

        Raises:
            MossError: the last turn and the reply do not fit the context, codes out of range.
        """
        if conversation is None:
            turns = with_default_system(turns, reply)
        *pieces, header = prompt_pieces(turns, reply, self.text_tokenizer, self.config)
        roles = [ROLES.index(turn.role) for turn in turns]
        if conversation is None:
            said = []
            replies = 0
            columns = 0
        else:
            conversation.check()
            if conversation.language_model is not self:
                raise MossError("conversation: of another language model, expected one that began or resumed with this")
            replies = int(conversation.replies)
            columns = int(conversation.state.filled)
            closing = self._closing(conversation)
            said = np.split(
                np.concatenate([np.asarray(conversation.state.grid)[0, :columns], closing]), conversation.starts[1:]
            )
            roles = [*conversation.roles, *roles]
        whole = [*said, *pieces]
        kept = self._fit([len(piece) for piece in whole], roles, len(header) + settings.max_new_tokens)
        notices = []
        state = None if conversation is None else conversation.state
        if len(kept) < len(whole):
            notices.append(self._full(len(whole) - len(kept)))
            whole = [whole[i] for i in kept]
            roles = [roles[i] for i in kept]
            new = [*whole, header]
            columns = 0
            state = None if state is None else emptied(state)
        else:
            new = [*pieces, header] if conversation is None else [closing, *pieces, header]
        new = np.concatenate(new)
        starts = np.cumsum([0, *map(len, whole)]).astype(np.int32)
        capacity = capacity_for(columns + len(new) + settings.max_new_tokens, self.context)
        if state is None:
            state = self._new_state(1, capacity)
        elif state.capacity < capacity:
            state = with_capacity(state, capacity)
        keys = jax.vmap(jax.random.fold_in, (0, None))(request_keys(seed, np.array([request])), replies)
        state = self._prefill(state, new[None], np.ones((1, len(new)), bool), keys)
        conversation = Conversation(
            state,
            starts,
            np.array([*roles, ROLES.index("assistant")], np.int32),
            np.int32(replies + 1),
            np.int32(columns + len(new)),
            self,
        )
        return conversation, notices

    @in_32_bits
    def begin_batch(
        self,
        questions: Sequence[Sequence[Turn]],
        reply: str,
        settings: GenerationSettings,
        *,
        seed: int = 0,
        requests: Sequence[int] | None = None,
        rows: int | None = None,
    ) -> tuple[GenerationState, int, list[list[str]]]:
        """Opens a reply to each question on one state of `rows` rows (at least as many as there are questions).

        Returns:
            The state, its first generated column, and the notices of each question, as `begin` gives them.

        Raises:
            MossError: as `begin` does; it says which question, counted from 1 as `requests` do from 0.
        """
        requests = list(range(len(questions)) if requests is None else requests)
        grids = []
        notices = []
        for request, turns in zip(requests, questions, strict=True):
            turns = with_default_system(turns, reply)
            *pieces, header = prompt_pieces(turns, reply, self.text_tokenizer, self.config)
            roles = [ROLES.index(turn.role) for turn in turns]
            try:
                kept = self._fit([len(piece) for piece in pieces], roles, len(header) + settings.max_new_tokens)
            except MossError as error:
                raise MossError(f"question {request + 1}: {error}") from error
            notices.append([self._full(len(pieces) - len(kept))] if len(kept) < len(pieces) else [])
            grids.append(np.concatenate([*(pieces[i] for i in kept), header]))
        spare = (rows or len(grids)) - len(grids)
        grid, valid = pad_left([*grids, *[np.zeros((0, 2), np.int32)] * spare], self.config)
        capacity = capacity_for(grid.shape[1] + settings.max_new_tokens, self.context)
        keys = jax.vmap(jax.random.fold_in, (0, None))(request_keys(seed, np.array(requests + [0] * spare)), 0)
        return self._prefill(self._new_state(len(grid), capacity), grid, valid, keys), grid.shape[1], notices

    @in_32_bits
    def go_on(self, state: GenerationState, settings: GenerationSettings, k: int) -> GenerationState:
        """Up to `k` rows more. Returns before they are computed."""
        settings = settings.replace(text_size=self.text_tokenizer.size)
        with self._on_mesh():
            return decode_chunk(self.params, state, settings, k, config=self.config)

    @in_32_bits
    def resume(self, path: str | Path) -> Conversation:
        """Reads what `Conversation.save` wrote.

        Raises:
            MossError: not such a file, one of another model, longer than the context, or with contents that no
                conversation has.
        """
        models = {FORMAT: self.fingerprint, FORMAT_1: fingerprint_1(self.params, self.config)}
        saved, turns, trusted = read_conversation(path, self.config, self.context, models)
        keys = jax.random.wrap_key_data(jax.device_put(saved.keys))
        filled = int(saved.filled)
        capacity = capacity_for(filled, self.context)
        if trusted:
            logits = new_state(self.config, 1, 1).logits
            state = jax.device_put(with_capacity(saved, capacity)).replace(logits=logits, keys=keys)
        else:
            state = self._prefill(self._new_state(1, capacity), saved.grid, saved.valid, keys)
            kept = ("mode", "step", "running", "stop", "lengths")
            state = state.replace(**{name: jnp.asarray(getattr(saved, name)) for name in kept})
        return Conversation(state, **turns, language_model=self)

    def _prefill(self, state: GenerationState, rows: np.ndarray, valid: np.ndarray, keys) -> GenerationState:
        count = rows.shape[1]
        room = ((0, 0), (0, state.capacity - count))
        rows = np.pad(rows, (*room, (0, 0)))
        valid = np.pad(valid, room)
        with self._on_mesh():
            return prefill(self.params, state, rows, valid, count, keys, config=self.config)

    def _new_state(self, batch: int, capacity: int) -> GenerationState:
        with self._on_mesh():
            return new_state(self.config, batch, capacity)

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _closing(self, conversation: Conversation) -> np.ndarray:
        """The rows [N, 2] that are missing after the latest reply: the end of speech that was cut, the turn's end."""
        last = np.asarray(conversation.state.grid)[0, int(conversation.state.filled) - 1]
        end = template_rows(TURN_END, self.text_tokenizer, self.config)
        if last[0] == self.config.im_end_id:
            return end[1:]
        mode = np.asarray(conversation.state.mode)[0]
        if int(next_mode(mode, last[0], last[1], self.config)) == AUDIO:
            return np.concatenate([[[self.config.modality_pad_id, self.config.eosp_id]], end]).astype(np.int32)
        return end

    def _full(self, dropped: int) -> str:
        return f"the context of {self.context} rows is full: the oldest {dropped} turns after the system turn went"

    def _fit(self, lengths: Sequence[int], roles: Sequence[int], reply: int) -> list[int]:
        """Indices of the turns that stay: the system turn in front and as many of the latest as fit with the reply."""
        system = int(roles[0] == ROLES.index("system"))
        first = system
        last = len(lengths) - 1
        while sum(lengths[:system]) + sum(lengths[first:]) + reply > self.context and first < last:
            first += 1
            while first < last and roles[first] == ROLES.index("assistant"):  # an answer without its question
                first += 1
        needed = sum(lengths[:system]) + sum(lengths[first:]) + reply
        if needed > self.context:
            raise MossError(
                f"context: the last turn of {lengths[last]} rows, the system turn and a reply of up to {reply} need "
                f"{needed} rows, expected at most {self.context}; shorten the turn or lower max_new_tokens"
            )
        return [*range(system), *range(first, len(lengths))]


def capacity_for(columns: int, context: int) -> int:
    """The bucket of so many columns: a power of two, at most `context`."""
    return min(max(SMALLEST, 1 << (columns - 1).bit_length()), context)

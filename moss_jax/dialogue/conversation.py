"""Conversations with the language model alone: turns of text and codes in, rows of the reply out.

A conversation keeps its caches from turn to turn, so that a new question costs only its own rows. When the context is
full, the oldest turns after the system turn are dropped, and the remaining ones pass the model again.
"""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moss_jax.dialogue.grid import pad_left, prompt_pieces, template_rows, with_default_system
from moss_jax.dialogue.saved import FORMAT, FORMAT_1, TURNS, fingerprint_1, read_conversation, write_conversation
from moss_jax.dialogue.turns import ROLES, Turn
from moss_jax.errors import MossError
from moss_jax.generate.loop import decode_chunk, prefill
from moss_jax.generate.sampling import GenerationSettings, request_keys
from moss_jax.generate.slots import GenerationState, capacity_for, cleared, new_state, with_capacity
from moss_jax.generate.state_machine import AUDIO, next_mode
from moss_jax.nn.fingerprint import fingerprint
from moss_jax.nn.precision import in_32_bits
from moss_jax.nn.tree import flatten
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.text.chat_template import TURN_END
from moss_jax.text.tokenizer import TextTokenizer

CONTEXT = 10240  # rows; the longest examples in the tuning of the released model


class ReplyProgress(NamedTuple):
    """The state of the latest reply on the host.

    Attributes:
        rows: int32 [T, 2], generated so far.
        running: whether the reply has not ended by itself.
        full: whether no more rows fit.
    """

    rows: np.ndarray
    running: bool
    full: bool


@struct.dataclass
class Conversation:
    """A conversation after a reply, as one pytree.

    The next question takes over its buffers, so each conversation can be continued once; `save` it to continue it
    several times.
    """

    state: GenerationState  # with B = 1
    starts: np.ndarray  # int32 [turns], the first column of each turn, the latest reply included
    roles: np.ndarray  # int32 [turns], index in ROLES
    replies: np.ndarray  # int32 [], number of replies, the latest included
    begin: np.ndarray  # int32 [], the first generated column of the latest reply
    language_model: "LanguageModel" = struct.field(pytree_node=False)  # that the caches belong to

    def progress(self) -> ReplyProgress:
        """The latest reply so far. Waits for the device, and transfers everything at once."""
        state = self.state
        grid, length, running, filled = jax.device_get((state.grid, state.lengths, state.running, state.filled))
        rows = grid[0, self.begin : self.begin + length[0]]
        return ReplyProgress(rows, bool(running[0]), int(filled) >= state.capacity)

    @property
    def rows(self) -> np.ndarray:
        """The rows of the latest reply so far, int32 [T, 2]."""
        return self.progress().rows

    @property
    def running(self) -> bool:
        """Whether the latest reply has not ended by itself."""
        return self.progress().running

    def check(self) -> None:
        """Raises MossError when the conversation has been continued already."""
        if isinstance(self.state.grid, jax.Array) and self.state.grid.is_deleted():
            raise MossError("conversation: it has already been continued; use that of the latest reply, or a saved one")

    @in_32_bits
    def save(self, path: str | Path) -> None:
        """Writes one safetensors file that `System.resume` reads, whole or not at all.

        Raises:
            MossError: the conversation has been continued already, or the file cannot be written.
        """
        self.check()
        turns = {name: getattr(self, name) for name in TURNS}
        write_conversation(path, self.state, turns, self.language_model.fingerprint)


class _Prompt(NamedTuple):
    """The turns that fit the context, and the request for a reply to them.

    Attributes:
        pieces: rows int32 [T, 2] of each turn.
        roles: of each turn, index in ROLES.
        header: rows int32 [T, 2] that request the reply.
        dropped: number of older turns that do not fit.
    """

    pieces: list[np.ndarray]
    roles: list[int]
    header: np.ndarray
    dropped: int

    def rows(self) -> np.ndarray:
        return np.concatenate([*self.pieces, self.header])


class LanguageModel:
    """The speech language model with its text tokenizer: `begin` a reply, then `decode` its rows.

    Args:
        config, params: of LayerSplitModel; params are nested.
        context: maximum number of rows of a conversation, replies included; None: what the model was trained for.
        mesh: the devices of `params`; None: one device.

    Raises:
        MossError: `context` exceeds the model's maximum.
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
        """Identifies the model in saved conversations: it depends on every bit of the weights, and on the settings that
        influence the values in the caches."""
        settings = (self.config.rope_theta, self.config.rms_norm_eps)
        return f"{fingerprint(flatten(self.params)):08x}-{zlib.crc32(repr(settings).encode()):08x}"

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
        """Adds `turns` (text and codes) to a conversation and begins a reply, of which no row is generated yet.

        Args:
            reply: "speech" or "text".
            seed, request: determine the random draws.
            conversation: to continue; it cannot be used afterwards. None: a new one, which gets the default system turn
                unless `turns` start with a system turn.

        Returns:
            The conversation, and notices: one line for each thing that the user should know.

        Raises:
            MossError: the last turn and the reply do not fit the context, or codes are out of range.
        """
        state = None
        columns = 0
        replies = 0
        if conversation is None:
            prompt = self._prompt(with_default_system(turns, reply), reply, settings)
        else:
            conversation.check()
            if conversation.language_model is not self:
                raise MossError(
                    "conversation: it belongs to another language model, expected one that this one began or resumed"
                )
            history = self._history(conversation)
            prompt = self._prompt(turns, reply, settings, history, conversation.roles.tolist())
            state = conversation.state
            replies = int(conversation.replies)
            if prompt.dropped:
                state = cleared(state)
            else:
                columns = int(state.filled)
        # The rows that have not passed the model: of a conversation in which no turn was dropped, only the new ones.
        rows = prompt.rows()[columns:]
        capacity = capacity_for(columns + len(rows) + settings.max_new_tokens, self.context)
        if state is None:
            state = self._new_state(1, capacity)
        elif state.capacity < capacity:
            state = with_capacity(state, capacity)
        keys = jax.vmap(jax.random.fold_in, (0, None))(request_keys(seed, np.array([request])), replies)
        conversation = Conversation(
            state=self._prefill(state, rows[None], np.ones((1, len(rows)), bool), keys),
            starts=np.cumsum([0, *map(len, prompt.pieces)]).astype(np.int32),
            roles=np.array([*prompt.roles, ROLES.index("assistant")], np.int32),
            replies=np.array(replies + 1, np.int32),
            begin=np.array(columns + len(rows), np.int32),
            language_model=self,
        )
        return conversation, self._notices(prompt)

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
        """Begins a reply to each of several new conversations, in one state.

        Args:
            questions: the turns of each conversation.
            requests: determine the random draws of each question with `seed`; by default 0, 1, ...
            rows: batch size of the state, at least the number of questions.

        Returns:
            The state, its first generated column, and the notices of each question, see `begin`.

        Raises:
            MossError: as `begin`; the message names the question by its request, counted from 1.
        """
        requests = list(range(len(questions)) if requests is None else requests)
        prompts = []
        for request, turns in zip(requests, questions, strict=True):
            try:
                prompts.append(self._prompt(with_default_system(turns, reply), reply, settings))
            except MossError as error:
                raise MossError(f"question {request + 1}: {error}") from error
        unused = (rows or len(prompts)) - len(prompts)
        grids = [*(prompt.rows() for prompt in prompts), *[np.zeros((0, 2), np.int32)] * unused]
        grid, valid = pad_left(grids, self.config)
        capacity = capacity_for(grid.shape[1] + settings.max_new_tokens, self.context)
        keys = jax.vmap(jax.random.fold_in, (0, None))(request_keys(seed, np.array(requests + [0] * unused)), 0)
        state = self._prefill(self._new_state(len(grid), capacity), grid, valid, keys)
        return state, grid.shape[1], [self._notices(prompt) for prompt in prompts]

    @in_32_bits
    def decode(self, state: GenerationState, settings: GenerationSettings, k: int) -> GenerationState:
        """Generates up to `k` more rows. `state` cannot be used afterwards. Returns before they are computed."""
        settings = dataclasses.replace(settings, text_size=self.text_tokenizer.size)
        with self._on_mesh():
            state = decode_chunk(self.params, state, settings, k, config=self.config)
        return state

    @in_32_bits
    def resume(self, path: str | Path) -> Conversation:
        """Reads the file that `Conversation.save` wrote.

        Raises:
            MossError: not such a file, saved with another model, longer than the context, or damaged.
        """
        models = {FORMAT: self.fingerprint, FORMAT_1: fingerprint_1(self.params, self.config)}
        saved, turns, has_caches = read_conversation(path, self.config, self.context, models)
        keys = jax.random.wrap_key_data(jax.device_put(saved.keys))
        capacity = capacity_for(int(saved.filled), self.context)
        if has_caches:
            logits = new_state(self.config, 1, 1).logits
            state = dataclasses.replace(jax.device_put(with_capacity(saved, capacity)), logits=logits, keys=keys)
        else:
            # The caches may be of other weights: the rows pass the model again, the rest of the state is kept.
            grid = np.asarray(saved.grid)
            state = self._prefill(self._new_state(1, capacity), grid, np.asarray(saved.valid), keys)
            state = dataclasses.replace(
                state,
                mode=jnp.asarray(saved.mode),
                step=jnp.asarray(saved.step),
                running=jnp.asarray(saved.running),
                stop=jnp.asarray(saved.stop),
                lengths=jnp.asarray(saved.lengths),
            )
        return Conversation(state, **turns, language_model=self)

    def _prompt(
        self,
        turns: Sequence[Turn],
        reply: str,
        settings: GenerationSettings,
        history: Sequence[np.ndarray] = (),
        history_roles: Sequence[int] = (),
    ) -> _Prompt:
        """The prompt of the earlier turns (rows int32 [T, 2] each) and the new ones, as far as they fit the context."""
        *new_pieces, header = prompt_pieces(turns, reply, self.text_tokenizer, self.config)
        pieces = [*history, *new_pieces]
        roles = [*history_roles, *(ROLES.index(turn.role) for turn in turns)]
        kept = self._fit([len(piece) for piece in pieces], roles, len(header) + settings.max_new_tokens)
        return _Prompt([pieces[i] for i in kept], [roles[i] for i in kept], header, len(pieces) - len(kept))

    def _history(self, conversation: Conversation) -> list[np.ndarray]:
        """The rows int32 [T, 2] of each earlier turn, the latest reply completed by the end of its turn."""
        state = conversation.state
        grid, filled, mode = jax.device_get((state.grid, state.filled, state.mode))
        rows = grid[0, :filled]
        return np.split(np.concatenate([rows, self._closing(rows[-1], mode[0])]), conversation.starts[1:])

    def _closing(self, last: np.ndarray, mode: np.ndarray) -> np.ndarray:
        """The rows int32 [T, 2] that complete a reply: the end of speech that was cut off, and the end of the turn.

        Args:
            last: int32 [2], the last row of the reply.
            mode: int32 [], in which that row was sampled.
        """
        end = template_rows(TURN_END, self.text_tokenizer, self.config)
        if last[0] == self.config.im_end_id:
            return end[1:]  # the reply ended with the first row of it
        if int(next_mode(mode, last[0], last[1], self.config)) == AUDIO:
            return np.concatenate([[[self.config.modality_pad_id, self.config.eosp_id]], end]).astype(np.int32)
        return end

    def _fit(self, lengths: Sequence[int], roles: Sequence[int], reply: int) -> list[int]:
        """Indices of the turns that are kept: the system turn, and as many of the latest as fit.

        Args:
            lengths, roles: of each turn, in rows and as index in ROLES.
            reply: rows to keep free for the reply and its header.

        Raises:
            MossError: the system turn, the last turn and the reply alone do not fit.
        """
        system = int(roles[0] == ROLES.index("system"))  # number of system turns, 0 or 1
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

    def _notices(self, prompt: _Prompt) -> list[str]:
        if not prompt.dropped:
            return []
        return [
            f"the context of {self.context} rows is full: the oldest {prompt.dropped} turns after the system turn were "
            "dropped"
        ]

    def _prefill(self, state: GenerationState, rows: np.ndarray, valid: np.ndarray, keys: jax.Array) -> GenerationState:
        """Prefills rows int32 [B, T, 2], padded to the capacity so that their number compiles nothing new."""
        count = rows.shape[1]
        padding = ((0, 0), (0, state.capacity - count))
        rows = np.pad(rows, (*padding, (0, 0)))
        valid = np.pad(valid, padding)
        with self._on_mesh():
            state = prefill(self.params, state, rows, valid, count, keys, config=self.config)
        return state

    def _new_state(self, batch: int, capacity: int) -> GenerationState:
        with self._on_mesh():
            state: GenerationState = new_state(self.config, batch, capacity)
        return state

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

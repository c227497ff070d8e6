"""Codes -> mel in a stream: only new frames are computed, everything earlier is cached.

    flow = CachedFlow(params, config)             # compiled functions and the noise; shared by all requests
    prompt = flow.prefill(voice)                  # once for a voice; shared by its streams, never written again
    stream = flow.stream(prompt)                  # one request
    mel = stream.push(codes)                      # float32 [1, 4n, M]: the frames that became final, n >= 0 codes
    mel = stream.finish()                         # the rest

Prompt and speech are one sequence of codes, divided into chunks of `config.chunk` codes, whether they belong to prompt
or speech. A chunk can be computed as soon as its look-ahead has arrived, and is final then. The functional core:

    empty(config, slots, dtype) -> state                                            before the first code
    begin(prompt_state, empty_state, prompt_codes, chunk) -> state                  a request after a prefilled prompt
    extend(params, config, noise, state, codes, count, chunks, shared) -> mel, state   the next chunks
    conclude(params, config, noise, state, codes, count, shared) -> mel             the codes that remain at the end

A `FlowState` is a pytree. Its cache is only read inside the Euler steps and layers; the new keys and values are outputs
of the scans and are written once at the end, into a donated buffer. S is the number of chunks that a cache holds.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moss_jax.errors import MossError
from moss_jax.nn.attention import Past
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.encoder import Keys, initial_encoder_tails
from moss_jax.speech_decoder.flow.estimator import initial_tails
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.flow.noise import noise
from moss_jax.speech_decoder.flow.positions import sinusoids
from moss_jax.speech_decoder.flow.sampler import check_codes, check_length, euler, repeated
from moss_jax.speech_decoder.voice import Voice

CACHE_BYTES = 4 * 2**30  # that a request may fill before it continues with a window
WINDOW = 96  # codes of context, in addition to the prompt, that a request keeps once its cache is full
FIRST_CODES = 80  # capacity of a new cache; it doubles when it is full
PREFILL_CODES = 20  # codes of a prompt that are computed at a time


class FlowCache(struct.PyTreeNode):
    """Keys and values in S slots of one chunk each.

    Attributes:
        k, v: [steps, L, config.rows, N, S * chunk_frames, H], of the estimator.
        code_k, code_v: [L, 1, N, S * chunk, H], of the encoder's layers before upsampling.
        frame_k, frame_v: [L, 1, N, S * chunk_frames, H], of those after it.
        chunks: int32 [S], the chunk in each slot.
    """

    k: jax.Array
    v: jax.Array
    code_k: jax.Array
    code_v: jax.Array
    frame_k: jax.Array
    frame_v: jax.Array
    chunks: jax.Array

    @property
    def slots(self) -> int:
        return self.chunks.shape[0]


class FlowState(struct.PyTreeNode):
    """The state of a stream.

    Attributes:
        cache: from slot `pinned` on it is a ring once it is full.
        encoder_tails, estimator_tails: of the convolutions, the latter for every Euler step.
        prompt_mel: float32 [1, T, M], the prompt's mel in the next chunks.
        speaker: float32 [1, M], the projected speaker embedding.
        chunk: int32, the next chunk of the sequence.
        first: int32, the chunk that slot 0 was first filled with.
        pinned: int32, the number of slots that are never overwritten.
    """

    cache: FlowCache
    encoder_tails: dict[str, jax.Array]
    estimator_tails: dict[str, Any]
    prompt_mel: jax.Array
    speaker: jax.Array
    chunk: jax.Array
    first: jax.Array
    pinned: jax.Array


def chunk_bytes(config: FlowConfig, dtype: str = "float32") -> int:
    """Bytes of cache for a chunk."""
    encoder = config.encoder
    estimator = config.estimator
    per_layer = 2 * estimator.num_heads * estimator.head_dim  # keys and values
    per_frame = per_layer * estimator.num_layers * config.euler_steps * config.rows
    per_frame += 2 * encoder.hidden_size * encoder.num_up_layers
    per_code = config.frames_per_code * per_frame + 2 * encoder.hidden_size * encoder.num_layers
    return config.chunk * per_code * jnp.dtype(dtype).itemsize


def last_chunks(config: FlowConfig) -> int:
    """Chunks for the codes that remain at the end: fewer than a chunk and its look-ahead, which `extend` would take."""
    return -(-(config.chunk + config.lookahead - 1) // config.chunk)


def prefilled_chunks(config: FlowConfig, prompt_codes: int) -> int:
    """Chunks of a prompt that are final before any speech, because their look-ahead is part of the prompt."""
    return max(prompt_codes - config.lookahead, 0) // config.chunk


def empty(config: FlowConfig, slots: int, dtype: str = "float32") -> FlowState:
    """The state before the first code, with a cache of `slots` chunks."""
    encoder = config.encoder
    estimator = config.estimator
    codes = slots * config.chunk
    frames = slots * config.chunk_frames
    head_dim = encoder.hidden_size // encoder.num_heads
    shape = (config.euler_steps, estimator.num_layers, config.rows, estimator.num_heads, frames, estimator.head_dim)
    code_shape = (encoder.num_layers, 1, encoder.num_heads, codes, head_dim)
    frame_shape = (encoder.num_up_layers, 1, encoder.num_heads, frames, head_dim)
    cache = FlowCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        code_k=jnp.zeros(code_shape, dtype),
        code_v=jnp.zeros(code_shape, dtype),
        frame_k=jnp.zeros(frame_shape, dtype),
        frame_v=jnp.zeros(frame_shape, dtype),
        chunks=jnp.zeros(slots, jnp.int32),
    )
    tails = initial_tails(config, config.rows)
    tails = jax.tree.map(lambda x: jnp.zeros((config.euler_steps, *x.shape), x.dtype), tails)
    return FlowState(
        cache=cache,
        encoder_tails=initial_encoder_tails(config, 1),
        estimator_tails=tails,
        prompt_mel=jnp.zeros((1, last_chunks(config) * config.chunk_frames, config.mel_bins)),
        speaker=jnp.zeros((1, config.mel_bins)),
        chunk=jnp.zeros((), jnp.int32),
        first=jnp.zeros((), jnp.int32),
        pinned=jnp.zeros((), jnp.int32),
    )


def begin(prompt: FlowState, state: FlowState, prompt_codes: jax.Array, chunk_size: int) -> FlowState:
    """The state of a request that continues a prefilled prompt with its own cache.

    The chunks that hold the remaining codes of the prompt are pinned in it. Shares no buffer with `prompt`.

    Args:
        state: an empty one, for its cache.
        prompt_codes: int32, the codes of the prompt.
    """
    pinned = (-(-prompt_codes // chunk_size) - prompt.chunk).astype(jnp.int32)
    own: FlowState = jax.tree.map(jnp.copy, prompt.replace(cache=None, first=prompt.chunk, pinned=pinned))
    return own.replace(cache=state.cache)


def extend(
    params: Any,
    config: FlowConfig,
    noise: jax.Array,
    state: FlowState,
    codes: jax.Array,
    count: jax.Array | int,
    chunks: jax.Array | int,
    shared: FlowCache | None = None,
    prompt_mel: jax.Array | None = None,
) -> tuple[jax.Array, FlowState]:
    """Computes the next n chunks of the sequence and keeps the first `chunks` of them.

    Args:
        noise: float32 [1, T, M], longer than the sequence up to the end of the n chunks.
        state: its cache is written; donate it.
        codes: int32 [1, n * chunk + lookahead], of which the first `count` exist.
        chunks: how many of the n chunks are complete, look-ahead included; the others are not kept.
        shared: the cache of a prefilled prompt, filled up to `state.first`; only read.
        prompt_mel: float32 [1, n * chunk_frames, M], the prompt's mel in the n chunks; None takes it from the state.

    Returns:
        (mel float32 [1, n * chunk_frames, M], the state after `chunks` chunks)
    """
    mel, new, later_prompt_mel = _compute(params, config, noise, state, codes, count, chunks, shared, prompt_mel)
    n = (codes.shape[1] - config.lookahead) // config.chunk
    index = state.chunk - state.first
    cache = state.cache
    # Once the cache is full, the oldest chunk that is not pinned is overwritten.
    slot = jnp.where(
        index < cache.slots, index, state.pinned + (index - state.pinned) % jnp.maximum(cache.slots - state.pinned, 1)
    )

    def write(buffer: jax.Array, rows: jax.Array, rows_per_slot: int) -> jax.Array:
        start = [0] * (buffer.ndim - 2)
        return jax.lax.dynamic_update_slice(buffer, rows.astype(buffer.dtype), (*start, slot * rows_per_slot, 0))

    cache = FlowCache(
        k=write(cache.k, new.keys[0], config.chunk_frames),
        v=write(cache.v, new.keys[1], config.chunk_frames),
        code_k=write(cache.code_k, new.code_keys[0], config.chunk),
        code_v=write(cache.code_v, new.code_keys[1], config.chunk),
        frame_k=write(cache.frame_k, new.frame_keys[0], config.chunk_frames),
        frame_v=write(cache.frame_v, new.frame_keys[1], config.chunk_frames),
        chunks=jax.lax.dynamic_update_slice(cache.chunks, state.chunk + jnp.arange(n, dtype=jnp.int32), (slot,)),
    )
    return mel, state.replace(
        cache=cache,
        encoder_tails=new.encoder_tails,
        estimator_tails=new.estimator_tails,
        prompt_mel=later_prompt_mel,
        chunk=state.chunk + jnp.asarray(chunks, jnp.int32),
    )


def conclude(
    params: Any,
    config: FlowConfig,
    noise: jax.Array,
    state: FlowState,
    codes: jax.Array,
    count: jax.Array,
    shared: FlowCache | None = None,
) -> jax.Array:
    """The mel of the last codes of a stream, which it continues with the same chunk mask.

    Args:
        codes: int32 [1, last_chunks * chunk + lookahead].
        count: int32, how many of them exist, 1 .. chunk + lookahead - 1.

    Returns:
        float32 [1, last_chunks * chunk_frames, M], of which the first 4 * count frames are valid.
    """
    mel, _, _ = _compute(params, config, noise, state, codes, count, 0, shared, None)
    return mel


class _New(NamedTuple):
    """What a call adds to the state: keys and values, and the tails of the convolutions."""

    keys: Keys
    code_keys: Keys
    frame_keys: Keys
    encoder_tails: dict[str, jax.Array]
    estimator_tails: dict[str, Any]


def _compute(
    params: Any,
    config: FlowConfig,
    noise: jax.Array,
    state: FlowState,
    codes: jax.Array,
    count: jax.Array | int,
    chunks: jax.Array | int,
    shared: FlowCache | None,
    prompt_mel: jax.Array | None,
) -> tuple[jax.Array, _New, jax.Array]:
    """(mel, what is to be kept, the prompt's mel after these chunks); arguments as for `extend`."""
    model = partial(FlowModel(config).apply, {"params": params})
    rows = codes.shape[1] - config.lookahead
    size = config.encoder.hidden_size
    frames = rows * config.frames_per_code
    valid = (jnp.arange(rows) < count)[None]
    start = state.chunk * config.chunk
    caches = [(state.cache, jnp.minimum(state.chunk - state.first, state.cache.slots))]
    if shared is not None:
        caches = [(shared, state.first), *caches]
    past = []
    code_past = []
    frame_past = []
    for cache, filled in caches:
        positions = cache.chunks[:, None] * config.chunk + jnp.arange(config.chunk)[None]
        position_k = sinusoids(positions.reshape(-1), size)
        code_past.append(Past(cache.code_k, cache.code_v, filled * config.chunk, (), position_k))
        positions = cache.chunks[:, None] * config.chunk_frames + jnp.arange(config.chunk_frames)[None]
        position_k = sinusoids(positions.reshape(-1), size)
        frame_past.append(Past(cache.frame_k, cache.frame_v, filled * config.chunk_frames, (), position_k))
        past.append(Past(cache.k, cache.v, filled * config.chunk_frames))

    x = model(codes, jnp.reshape(count, (1,)), method="embed")
    mu, encoder = model(
        x,
        valid,
        config.chunk,
        tails=state.encoder_tails,
        start=start,
        length=chunks * config.chunk,
        past=code_past,
        up_past=frame_past,
        method="encode",
    )
    later_prompt_mel = state.prompt_mel
    if prompt_mel is None:
        prompt_mel = state.prompt_mel[:, :frames]
        later_prompt_mel = jnp.concatenate([state.prompt_mel[:, frames:], jnp.zeros_like(prompt_mel)], 1)
    every_row = jnp.repeat(repeated(config, valid), config.frames_per_code, 1)

    def estimate(
        x: jax.Array, mu: jax.Array, speaker: jax.Array, prompt: jax.Array, time: Any, step: jax.Array, tails: Any
    ) -> tuple[jax.Array, Any]:
        result: tuple[jax.Array, Any] = model(
            x,
            mu,
            speaker,
            prompt,
            time,
            every_row,
            config.chunk_frames,
            tails=tails,
            length=chunks * config.chunk_frames,
            past=[part.replace(index=(step,)) for part in past],
            method="velocity",
        )
        return result

    x = jax.lax.dynamic_slice_in_dim(noise, start * config.frames_per_code, frames, 1)
    states, estimator = euler(config, model, x, mu, state.speaker, prompt_mel, estimate, state.estimator_tails)
    new = _New(estimator["keys"], encoder["keys"], encoder["up_keys"], encoder["tails"], estimator["tails"])
    return states[-1], new, later_prompt_mel


@lru_cache(maxsize=8)
def _compiled(config: FlowConfig) -> tuple[Any, Any, Any, Any]:
    """The jitted functions of a config: one chunk, a piece of a prompt, the end, the speaker projection."""

    def highest(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            with jax.default_matmul_precision("highest"):
                return function(*inputs)

        return run

    def step(
        params: Any, noise: jax.Array, shared: FlowCache, state: FlowState, codes: jax.Array
    ) -> tuple[jax.Array, FlowState]:
        return extend(params, config, noise, state, codes, codes.shape[1], 1, shared)

    def piece(
        params: Any,
        noise: jax.Array,
        state: FlowState,
        codes: jax.Array,
        count: jax.Array,
        chunks: jax.Array,
        prompt_mel: jax.Array,
    ) -> FlowState:
        _, state = extend(params, config, noise, state, codes, count, chunks, None, prompt_mel)
        return state

    def last(
        params: Any, noise: jax.Array, shared: FlowCache, state: FlowState, codes: jax.Array, count: jax.Array
    ) -> jax.Array:
        return conclude(params, config, noise, state, codes, count, shared)

    def project(params: Any, embedding: jax.Array) -> Any:
        return FlowModel(config).apply({"params": params}, embedding, method="speaker_projection")

    return (
        jax.jit(highest(step), donate_argnums=3),
        jax.jit(highest(piece), donate_argnums=2),
        jax.jit(highest(last)),
        jax.jit(highest(project)),
    )


class CachedFlow:
    """The compiled functions of one set of parameters, for all voices and requests.

    Args:
        params: nested parameters of `FlowModel`, trained for chunks of `config.chunk`.
        memory: bytes of cache that one request may fill, without the prompt's cache, which the requests of a voice
            share. While everything fits, the stream is exact. After that it keeps the last `window` codes and the
            chunks with codes of the prompt; each new chunk overwrites the oldest, and memory and time are constant.
        window: codes; as many whole chunks as fit in them are kept, but no more than `memory` holds.
        dtype: of the cache, "float32" or "bfloat16".

    Raises:
        MossError: `memory` is too small.
    """

    def __init__(
        self,
        params: Any,
        config: FlowConfig,
        *,
        memory: int = CACHE_BYTES,
        window: int = WINDOW,
        dtype: str = "float32",
    ) -> None:
        self.params = params
        self.config = config
        self.dtype = dtype
        self.slots = min(memory // chunk_bytes(config, dtype), -(-config.max_codes // config.chunk))
        min_slots = _min_slots(config)
        if self.slots < min_slots:
            raise MossError(
                f"flow cache: {memory} bytes hold {self.slots} chunks, expected at least {min_slots} "
                f"({min_slots * chunk_bytes(config, dtype)} bytes)"
            )
        self.window = min(max(window // config.chunk, min_slots), self.slots)
        # The last call may read noise after the end of the sequence, for rows that do not exist.
        padding = (PREFILL_CODES + config.chunk) * config.frames_per_code * 2
        self.noise = jnp.pad(noise(config.noise_frames, config.mel_bins), ((0, 0), (0, padding), (0, 0)))
        self._step, self._piece, self._last, self._project = _compiled(config)

    def prefill(self, voice: Voice) -> "Prompt":
        """Computes the part of a voice's prompt that does not depend on the speech after it.

        Raises:
            MossError: codes out of range, or a prompt that leaves no frame of noise for speech.
        """
        config = self.config
        codes = np.asarray(voice.codes, np.int32)
        if codes.size:
            check_codes(config, codes, 0)
        check_length(config, codes.size, 1)
        mel = np.asarray(config.normalized(voice.mel), np.float32)
        mel = mel.reshape(1, codes.size * config.frames_per_code, config.mel_bins)
        chunks = prefilled_chunks(config, codes.size)
        piece = max(PREFILL_CODES // config.chunk, 1)
        state = empty(config, max(-(-chunks // piece) * piece, 1), self.dtype)
        state = state.replace(speaker=self._project(self.params, np.asarray(voice.embedding, np.float32)[None]))
        for first in range(0, chunks, piece):
            start = first * config.chunk
            end = (first + piece) * config.chunk
            ids, count = _padded_codes(codes[start : end + config.lookahead], piece * config.chunk + config.lookahead)
            part = mel[:, start * config.frames_per_code : end * config.frames_per_code]
            part = _padded_mel(part, piece * config.chunk_frames)
            state = self._piece(self.params, self.noise, state, ids, count, min(piece, chunks - first), part)
        rest = mel[:, chunks * config.chunk_frames :]
        state = state.replace(prompt_mel=jnp.asarray(_padded_mel(rest, state.prompt_mel.shape[1])))
        return Prompt(state, codes)

    def stream(self, prompt: "Prompt") -> "FlowStream":
        """A new request with a prefilled voice."""
        return FlowStream(self, prompt)


class Prompt(struct.PyTreeNode):
    """A prefilled voice: its state, which is never written again, and its codes int32 [P]."""

    state: FlowState
    codes: np.ndarray = struct.field(pytree_node=False)


class FlowStream:
    """One request, which takes codes in any portions and returns mel. `state` is a pytree."""

    def __init__(self, flow: CachedFlow, prompt: Prompt) -> None:
        config = flow.config
        self.flow = flow
        self.prompt = prompt
        chunks = prefilled_chunks(config, prompt.codes.size)
        self._pending = prompt.codes[chunks * config.chunk :]  # codes of chunks that are not computed yet
        self._pending_prompt = self._pending.size  # how many of them belong to the prompt
        self._chunks = 0  # written into the request's own cache so far
        self.codes = 0  # of speech so far
        slots = min(flow.slots, max(-(-FIRST_CODES // config.chunk), _min_slots(config)))
        initial = empty(config, slots, flow.dtype)
        self.state = begin(prompt.state, initial, jnp.asarray(prompt.codes.size, jnp.int32), config.chunk)

    def push(self, codes: np.ndarray) -> np.ndarray:
        """Takes codes int [N] and returns the mel of the frames that they complete, float32 [1, T, M], T >= 0.

        Raises:
            MossError: codes out of range, or more of them than the flow supports.
        """
        config = self.flow.config
        flow = self.flow
        if len(codes):
            codes = check_codes(config, codes, self.prompt.codes.size + self.codes)
            self._pending = np.concatenate([self._pending, codes])
            self.codes += codes.size
        mels = []
        while self._pending.size >= config.chunk + config.lookahead:
            if self._chunks == flow.slots > flow.window:
                self.state = shrink_to_window(self.state, flow.window)
            elif self._chunks == self.state.cache.slots < flow.slots:
                self.state = grow(self.state, min(2 * self._chunks, flow.slots))
            ids = self._pending[None, : config.chunk + config.lookahead]
            mel, self.state = flow._step(flow.params, flow.noise, self.prompt.state.cache, self.state, ids)
            self._chunks += 1
            mels.append(self._speech(mel, config.chunk))
        return np.concatenate([np.zeros((1, 0, config.mel_bins), np.float32), *mels], 1)

    def finish(self) -> np.ndarray:
        """Returns the mel of the remaining codes, float32 [1, T, M], and ends the stream.

        Raises:
            MossError: there were no codes of speech.
        """
        config = self.flow.config
        flow = self.flow
        if self.codes == 0:
            raise MossError("speech codes: none in the stream, expected at least one")
        ids, count = _padded_codes(self._pending, last_chunks(config) * config.chunk + config.lookahead)
        mel = flow._last(flow.params, flow.noise, self.prompt.state.cache, self.state, ids, count)
        return self._speech(mel, int(count))

    def _speech(self, mel: jax.Array, codes: int) -> np.ndarray:
        """The mel of the next `codes` codes without the prompt's part and the padding; they are pending no longer."""
        frames = self.flow.config.frames_per_code
        prompt = min(self._pending_prompt, codes)
        self._pending = self._pending[codes:]
        self._pending_prompt -= prompt
        # On the host: a slice there compiles nothing.
        return self.flow.config.denormalized(np.asarray(mel)[:, prompt * frames : codes * frames])


def _min_slots(config: FlowConfig) -> int:
    """The smallest cache: the chunks that may hold codes of the prompt, and one chunk of speech."""
    return last_chunks(config) + 2


def grow(state: FlowState, slots: int) -> FlowState:
    """The state with a cache of more slots."""

    def pad(buffer: jax.Array, axis: int) -> jax.Array:
        pads = [(0, 0)] * buffer.ndim
        pads[axis] = (0, buffer.shape[axis] // state.cache.slots * slots - buffer.shape[axis])
        return jnp.pad(buffer, pads)

    return _with_buffers(state, pad)


def shrink_to_window(state: FlowState, slots: int) -> FlowState:
    """The state, whose cache is just full, with a cache of fewer slots: the pinned chunks and the latest ones."""
    old = state.cache.slots
    pinned = int(state.pinned)
    ring = slots - pinned
    latest = np.arange(old - ring, old)
    kept = np.arange(slots)  # the old slot of each new one
    kept[pinned + (latest - pinned) % ring] = latest

    def take(buffer: jax.Array, axis: int) -> jax.Array:
        rows = buffer.shape[axis] // old
        return jnp.take(buffer, (kept[:, None] * rows + np.arange(rows)).reshape(-1), axis)

    return _with_buffers(state, take)


def _with_buffers(state: FlowState, resize: Callable[[jax.Array, int], jax.Array]) -> FlowState:
    """The state with `resize(buffer, axis of the slots)` of each buffer, one by one: at most one is held twice."""
    parts = {}
    for name in ("k", "v", "code_k", "code_v", "frame_k", "frame_v"):
        buffer = getattr(state.cache, name)
        parts[name] = resize(buffer, buffer.ndim - 2).block_until_ready()
        buffer.delete()
    return state.replace(cache=FlowCache(**parts, chunks=resize(state.cache.chunks, 0)))


def _padded_codes(codes: np.ndarray, size: int) -> tuple[np.ndarray, np.int32]:
    ids = np.zeros((1, size), np.int32)
    ids[0, : codes.size] = codes
    return ids, np.int32(codes.size)


def _padded_mel(mel: np.ndarray, frames: int) -> np.ndarray:
    return np.pad(mel, ((0, 0), (0, frames - mel.shape[1]), (0, 0)))

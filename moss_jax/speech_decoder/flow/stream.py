"""Codes -> mel as they arrive: only new frames are computed, whatever went before is cached.

    flow = CachedFlow(params, config)             # compiled functions and the noise; one for all requests
    prompt = flow.prefill(voice)                  # once a voice; read by all its streams, never written again
    stream = flow.stream(prompt)                  # one request
    mel = stream.push(codes)                      # float32 [1, 4n, M]: the frames that became final, n >= 0 codes
    mel = stream.finish()                         # the rest

Prompt and speech are one sequence of codes, cut in chunks of C: chunk i holds codes iC .. iC + C - 1, whoever they
belong to. A chunk can be computed as soon as the look-ahead after it is there, and never changes again. The functional
core below needs nothing else:

    empty(config, slots, dtype) -> state                                            before the first code
    extend(params, config, noise, state, codes, count, chunks, shared) -> mel, state   some chunks more
    begin(prompt_state, empty_state, prompt_codes, C) -> state                      a request after a prefilled prompt
    conclude(params, config, noise, state, codes, count, shared) -> mel             what is left at the end

A `FlowState` is a pytree. Its cache is only read inside the Euler steps and layers; the new keys and values come out of
the scans and are written once at the end, into a donated buffer.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moss_jax.errors import MossError
from moss_jax.nn.attention import Past
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.encoder import initial_encoder_tails
from moss_jax.speech_decoder.flow.estimator import initial_tails
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.flow.noise import noise
from moss_jax.speech_decoder.flow.positions import sinusoids
from moss_jax.speech_decoder.flow.sampler import check_codes, check_length, euler, repeated

MEMORY = 4 * 2**30  # bytes of cache that a request may fill; beyond them it goes on with a window
WINDOW = 96  # codes of left context, beside the prompt, that a request keeps once its cache is full
FIRST_CODES = 80  # codes that a stream has room for before its cache first grows
PREFILL_CODES = 20  # codes of a prompt that are computed at a time


@struct.dataclass
class FlowCache:
    """Keys and values of S slots of one chunk each, and which chunk each slot holds.

    `k`, `v` [steps, L, config.rows, N, S * frames, H] of the estimator; `code_k`, `code_v` [L, 1, N, S * C, H] and
    `frame_k`, `frame_v` [L, 1, N, S * frames, H] of the encoder's layers before and after upsampling; `chunks` int32
    [S].
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


@struct.dataclass
class FlowState:
    """Everything a stream remembers.

    `chunk` is the next absolute chunk, `first` the one that slot 0 was filled with; from slot `pinned` on the cache is
    a ring once it is full (int32 scalars). `encoder_tails`, `estimator_tails`: of the convolutions, the latter for
    every Euler step. `prompt_mel` float32 [1, T, M]: the prompt's in the chunks to come. `speaker` float32 [1, M].
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
    """Bytes of cache that a chunk takes."""
    encoder = config.encoder
    estimator = config.estimator
    a_frame = 2 * estimator.num_heads * estimator.head_dim * estimator.num_layers * config.euler_steps * config.rows
    a_frame += 2 * encoder.hidden_size * encoder.num_up_layers
    a_code = config.frames_per_code * a_frame + 2 * encoder.hidden_size * encoder.num_layers
    return config.chunk * a_code * jnp.dtype(dtype).itemsize


def last_chunks(config: FlowConfig) -> int:
    """Chunks that hold the codes left at the end: one chunk and its look-ahead would have been computed before."""
    return -(-(config.chunk + config.lookahead - 1) // config.chunk)


def prefilled_chunks(config: FlowConfig, prompt_codes: int) -> int:
    """Chunks of a prompt that are final before any speech: their look-ahead lies within the prompt."""
    return max(prompt_codes - config.lookahead, 0) // config.chunk


def empty(config: FlowConfig, slots: int, dtype: str = "float32") -> FlowState:
    """The state before the first code, with a cache of `slots` chunks."""
    encoder = config.encoder
    estimator = config.estimator
    dtype = jnp.dtype(dtype)
    codes = slots * config.chunk
    frames = slots * config.chunk_frames
    head = encoder.hidden_size // encoder.num_heads

    def zeros(*shape):
        return jnp.zeros(shape, dtype)

    wide = (config.euler_steps, estimator.num_layers, config.rows, estimator.num_heads, frames, estimator.head_dim)
    at_codes = (encoder.num_layers, 1, encoder.num_heads, codes, head)
    at_frames = (encoder.num_up_layers, 1, encoder.num_heads, frames, head)
    cache = FlowCache(
        zeros(*wide),
        zeros(*wide),
        zeros(*at_codes),
        zeros(*at_codes),
        zeros(*at_frames),
        zeros(*at_frames),
        jnp.zeros(slots, jnp.int32),
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
    """A request's state: `state` with an empty cache, where `prompt`, prefilled, has come to. The chunks that still
    hold some of the `prompt_codes` are pinned in the request's own cache. Shares no buffer with `prompt`."""
    pinned = (-(-prompt_codes // chunk_size) - prompt.chunk).astype(jnp.int32)
    own = jax.tree.map(jnp.copy, prompt.replace(cache=None, first=prompt.chunk, pinned=pinned))
    return own.replace(cache=state.cache)


def extend(
    params: Any,
    config: FlowConfig,
    noise: jax.Array,
    state: FlowState,
    codes: jax.Array,
    count: jax.Array,
    chunks: jax.Array | int,
    shared: FlowCache | None = None,
    prompt_mel: jax.Array | None = None,
) -> tuple[jax.Array, FlowState]:
    """Computes the next n chunks of the sequence and keeps the first `chunks` of them.

    Args:
        noise: float32 [1, F, M] that reaches beyond the last of the n chunks.
        state: its cache is written; donate it.
        codes: int32 [1, n * C + lookahead], of which the first `count` exist.
        chunks: how many of the n chunks are complete (their look-ahead too); the others are not kept.
        shared: the cache of a prefilled prompt, full up to `state.first`; only read.
        prompt_mel: in the n chunks, float32 [1, n * frames, M]; None takes it from the state.

    Returns:
        mel float32 [1, n * frames, M] and the state after `chunks` chunks.
    """
    mel, kept, later = _compute(params, config, noise, state, codes, count, chunks, shared, prompt_mel)
    n = (codes.shape[1] - config.lookahead) // config.chunk
    index = state.chunk - state.first
    cache = state.cache
    # Once the cache is full the oldest chunk that is not pinned goes.
    slot = jnp.where(
        index < cache.slots, index, state.pinned + (index - state.pinned) % jnp.maximum(cache.slots - state.pinned, 1)
    )

    def write(buffer, new, rows):
        at = [0] * buffer.ndim
        at[-2] = slot * rows
        return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), at)

    cache = FlowCache(
        *(
            write(buffer, new, config.chunk_frames)
            for buffer, new in zip((cache.k, cache.v), kept["keys"], strict=True)
        ),
        *(
            write(buffer, new, config.chunk)
            for buffer, new in zip((cache.code_k, cache.code_v), kept["code_keys"], strict=True)
        ),
        *(
            write(buffer, new, config.chunk_frames)
            for buffer, new in zip((cache.frame_k, cache.frame_v), kept["frame_keys"], strict=True)
        ),
        jax.lax.dynamic_update_slice(cache.chunks, state.chunk + jnp.arange(n, dtype=jnp.int32), (slot,)),
    )
    return mel, state.replace(
        cache=cache,
        encoder_tails=kept["encoder_tails"],
        estimator_tails=kept["estimator_tails"],
        prompt_mel=later,
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
    """The mel of the last `count` codes (1 .. C + lookahead - 1), which nothing follows.

    codes int32 [1, last_chunks * C + lookahead] -> float32 [1, last_chunks * frames, M], of which the first
    4 * count frames are valid. It continues the stream under its chunk mask.
    """
    return _compute(params, config, noise, state, codes, count, 0, shared, None)[0]


def _compute(params, config, noise, state, codes, count, chunks, shared, prompt_mel):
    """-> mel, what is to be kept, the prompt's mel after these chunks."""
    model = partial(FlowModel(config).apply, {"params": params})
    rows = codes.shape[1] - config.lookahead
    size = config.encoder.hidden_size
    frames = rows * config.frames_per_code
    valid = (jnp.arange(rows) < count)[None]
    start = state.chunk * config.chunk
    parts = [(state.cache, jnp.minimum(state.chunk - state.first, state.cache.slots))]
    if shared is not None:
        parts = [(shared, state.first), *parts]
    past = []
    code_past = []
    frame_past = []
    for cache, filled in parts:
        positions = (cache.chunks[:, None] * config.chunk + jnp.arange(config.chunk)).reshape(-1)
        slot_positions = sinusoids(positions, size)
        code_past.append(Past(cache.code_k, cache.code_v, filled * config.chunk, (), slot_positions))
        positions = cache.chunks[:, None] * config.chunk_frames + jnp.arange(config.chunk_frames)
        slot_positions = sinusoids(positions.reshape(-1), size)
        frame_past.append(Past(cache.frame_k, cache.frame_v, filled * config.chunk_frames, (), slot_positions))
        past.append(Past(cache.k, cache.v, filled * config.chunk_frames))

    x = model(codes, jnp.reshape(count, (1,)), method="embed")
    mu, kept = model(
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
    later = state.prompt_mel
    if prompt_mel is None:
        prompt_mel = later[:, :frames]
        later = jnp.concatenate([later[:, frames:], jnp.zeros_like(prompt_mel)], 1)
    every_row = jnp.repeat(repeated(config, valid), config.frames_per_code, 1)

    def velocity(x, mu, speaker, prompt, time, step, tails):
        return model(
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

    x = jax.lax.dynamic_slice_in_dim(noise, start * config.frames_per_code, frames, 1)
    states, moved = euler(config, model, x, mu, state.speaker, prompt_mel, velocity, state.estimator_tails)
    return (
        states[-1],
        {
            "keys": moved["keys"],
            "code_keys": kept["keys"],
            "frame_keys": kept["up_keys"],
            "encoder_tails": kept["tails"],
            "estimator_tails": moved["tails"],
        },
        later,
    )


@lru_cache(maxsize=8)
def _compiled(config: FlowConfig):
    """The jitted functions of a config: one chunk, a piece of a prompt, the end, the speaker projection."""

    def highest(function):
        def run(*inputs):
            with jax.default_matmul_precision("highest"):
                return function(*inputs)

        return run

    def step(params, noise, shared, state, codes):
        return extend(params, config, noise, state, codes, codes.shape[1], 1, shared)

    def piece(params, noise, state, codes, count, chunks, prompt_mel):
        return extend(params, config, noise, state, codes, count, chunks, None, prompt_mel)[1]

    def last(params, noise, shared, state, codes, count):
        return conclude(params, config, noise, state, codes, count, shared)

    def project(params, embedding):
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
        params: the parameters of `FlowModel`, nested; those of a checkpoint trained for chunks of `config.chunk`.
        memory: bytes of cache that one request may fill (its prompt's, shared by the requests of a voice, not counted).
            While everything fits the stream is exact; then it keeps the last `window` codes and what holds some
            prompt, each new chunk in the place of the oldest, and memory and time are constant.
        window: codes; as many whole chunks as fit in them are kept, but no more than `memory` holds.
        dtype: of the cache, "float32" or "bfloat16".
    """

    def __init__(
        self, params: Any, config: FlowConfig, *, memory: int = MEMORY, window: int = WINDOW, dtype: str = "float32"
    ):
        self.params = params
        self.config = config
        self.dtype = dtype
        self.slots = min(memory // chunk_bytes(config, dtype), -(-config.max_codes // config.chunk))
        least = last_chunks(config) + 2  # what may hold some prompt, and one chunk of speech
        if self.slots < least:
            raise MossError(
                f"flow cache: {memory} bytes hold {self.slots} chunks, expected at least {least} "
                f"({least * chunk_bytes(config, dtype)} bytes)"
            )
        self.window = min(max(window // config.chunk, least), self.slots)
        beyond = (PREFILL_CODES + config.chunk) * config.frames_per_code * 2
        self.noise = jnp.pad(noise(config.noise_frames, config.mel_bins), ((0, 0), (0, beyond), (0, 0)))

        self._step, self._piece, self._last, self._project = _compiled(config)

    def prefill(self, voice: Any) -> "Prompt":
        """Computes the part of a voice's prompt that does not depend on what is said.

        Args:
            voice: has `codes` int [P], `mel` float [4P, M], `embedding` float [E]; P may be 0.

        Raises:
            MossError: codes out of range, or a prompt as long as the noise buffer.
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
            begin = first * config.chunk
            end = (first + piece) * config.chunk
            ids, count = _padded(codes[begin : end + config.lookahead], piece * config.chunk + config.lookahead)
            part = mel[:, begin * config.frames_per_code : end * config.frames_per_code]
            part = _lengthened(part, piece * config.chunk_frames)
            state = self._piece(self.params, self.noise, state, ids, count, min(piece, chunks - first), part)
        rest = mel[:, chunks * config.chunk_frames :]
        state = state.replace(prompt_mel=jnp.asarray(_lengthened(rest, state.prompt_mel.shape[1])))
        return Prompt(state, codes)

    def stream(self, prompt: "Prompt") -> "FlowStream":
        return FlowStream(self, prompt)


@struct.dataclass
class Prompt:
    """A prefilled voice: its state, only read from now on, and its codes int32 [P]."""

    state: FlowState
    codes: np.ndarray = struct.field(pytree_node=False)


class FlowStream:
    """One request: codes in, in whatever portions, mel out. `state` is its state, a pytree."""

    def __init__(self, flow: CachedFlow, prompt: Prompt):
        config = flow.config
        self.flow = flow
        self.prompt = prompt
        chunks = prefilled_chunks(config, prompt.codes.size)
        self._waiting = prompt.codes[chunks * config.chunk :]  # codes of chunks that are not computed yet
        self._prompt_waiting = self._waiting.size  # how many of them are the prompt's
        self._chunks = 0  # in the request's own cache so far, overwritten ones too
        self.codes = 0  # of speech so far
        slots = min(flow.slots, max(-(-FIRST_CODES // config.chunk), last_chunks(config) + 2))
        own = empty(config, slots, flow.dtype)
        self.state = begin(prompt.state, own, jnp.asarray(prompt.codes.size, jnp.int32), config.chunk)

    def push(self, codes: np.ndarray) -> np.ndarray:
        """Codes int [n] -> mel float32 [1, 4m, M] of the frames that they complete; m >= 0.

        Raises:
            MossError: codes out of range, or the sequence longer than the noise buffer.
        """
        config = self.flow.config
        flow = self.flow
        if len(codes):
            codes = check_codes(config, codes, self.prompt.codes.size + self.codes)
            self._waiting = np.concatenate([self._waiting, codes])
            self.codes += codes.size
        mels = []
        while self._waiting.size >= config.chunk + config.lookahead:
            if self._chunks == flow.slots > flow.window:
                self.state = narrowed(self.state, flow.window)
            elif self._chunks == self.state.cache.slots < flow.slots:
                self.state = grown(self.state, min(2 * self._chunks, flow.slots))
            ids = self._waiting[None, : config.chunk + config.lookahead]
            mel, self.state = flow._step(flow.params, flow.noise, self.prompt.state.cache, self.state, ids)
            self._chunks += 1
            mels.append(self._speech(mel, config.chunk))
        return np.concatenate([np.zeros((1, 0, config.mel_bins), np.float32), *mels], 1)

    def finish(self) -> np.ndarray:
        """The mel of the codes that still waited for what follows them. The stream is over then.

        Raises:
            MossError: there was not one code of speech.
        """
        config = self.flow.config
        flow = self.flow
        if self.codes == 0:
            raise MossError("speech codes: none in the stream, expected at least one")
        ids, count = _padded(self._waiting, last_chunks(config) * config.chunk + config.lookahead)
        mel = flow._last(flow.params, flow.noise, self.prompt.state.cache, self.state, ids, count)
        return self._speech(mel, int(count))

    def _speech(self, mel: jax.Array, codes: int) -> np.ndarray:
        """Cuts the prompt's part and the padding off the mel of the next `codes` codes, which wait no longer."""
        frames = self.flow.config.frames_per_code
        prompt = min(self._prompt_waiting, codes)
        self._waiting = self._waiting[codes:]
        self._prompt_waiting -= prompt
        # On the host: a slice there compiles nothing.
        return self.flow.config.denormalized(np.asarray(mel)[:, prompt * frames : codes * frames])


def grown(state: FlowState, slots: int) -> FlowState:
    """The state with a cache of more slots."""

    def longer(buffer, axis):
        room = [(0, 0)] * buffer.ndim
        room[axis] = (0, buffer.shape[axis] // state.cache.slots * slots - buffer.shape[axis])
        return jnp.pad(buffer, room)

    return _moved(state, longer)


def narrowed(state: FlowState, slots: int) -> FlowState:
    """The state, whose cache is just full, with a cache of fewer slots: of the pinned chunks and the latest ones."""
    old = state.cache.slots
    pinned = int(state.pinned)
    ring = slots - pinned
    latest = np.arange(old - ring, old)
    kept = np.arange(slots)  # which slot moves to each
    kept[pinned + (latest - pinned) % ring] = latest

    def shorter(buffer, axis):
        rows = buffer.shape[axis] // old
        return jnp.take(buffer, (kept[:, None] * rows + np.arange(rows)).reshape(-1), axis)

    return _moved(state, shorter)


def _moved(state: FlowState, move: Callable[[jax.Array, int], jax.Array]) -> FlowState:
    """`move(buffer, axis of the slots)` of one array after the other, so that at most one is held twice."""
    parts = {}
    for name in ("k", "v", "code_k", "code_v", "frame_k", "frame_v"):
        buffer = getattr(state.cache, name)
        parts[name] = move(buffer, buffer.ndim - 2).block_until_ready()
        buffer.delete()
    return state.replace(cache=FlowCache(**parts, chunks=move(state.cache.chunks, 0)))


def _padded(codes: np.ndarray, size: int) -> tuple[np.ndarray, np.int32]:
    ids = np.zeros((1, size), np.int32)
    ids[0, : codes.size] = codes
    return ids, np.int32(codes.size)


def _lengthened(mel: np.ndarray, frames: int) -> np.ndarray:
    return np.pad(mel, ((0, 0), (0, frames - mel.shape[1]), (0, 0)))

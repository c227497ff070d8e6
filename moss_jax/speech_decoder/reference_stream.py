"""Streaming as the released code does it: every chunk runs the flow on the prompt and all codes so far.

For comparison with the reference; `stream.py` has the one for use. Each rendering starts its source anew, the
cross-fade adds up to 1.08, and the last chunk is the end of an offline decode. Source: `CosyVoice2Model.token2wav`.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from moss_jax.errors import MossError
from moss_jax.nn.precision import in_32_bits
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.flow import sampler
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.vocoder import HiFT, sine_noise
from moss_jax.speech_decoder.voice import Voice


@struct.dataclass
class Cache:
    """What the vocoder keeps from chunk to chunk."""

    mel: np.ndarray  # float32 [overlap, M]
    source: np.ndarray  # float32 [overlap * hop]
    speech: np.ndarray  # float32 [overlap * hop], cross-faded already


@struct.dataclass
class ReferenceState:
    """One stream; `ReferenceState()` is its beginning."""

    codes: np.ndarray = struct.field(default_factory=lambda: np.zeros(0, np.int32))  # int32 [N], all so far
    cursor: int = 0  # codes whose mel was emitted
    chunks: int = 0
    cache: Cache | None = None


class Chunk(NamedTuple):
    """One call of flow and vocoder."""

    codes: int  # the flow saw
    cursor: int  # of them, whose mel had been emitted before
    mel: np.ndarray  # float32 [4 * (codes - look-ahead), M], all that the flow returned
    source: np.ndarray  # float32 [samples], of the vocoder call
    wave: np.ndarray  # float32 [samples], emitted


class Models(NamedTuple):
    """What a stream runs on. `noise`: (index of the chunk, mel frames) -> float32 [frames * hop, harmonics]."""

    config: SpeechDecoderConfig
    flow_config: FlowConfig  # with the chunk size
    flow: Any  # nested parameters of FlowModel
    vocoder: Any  # nested folded parameters of HiFT
    voice: Voice
    noise: Callable[[int, int], np.ndarray]
    buffer: np.ndarray | None = None  # float32 [1, F, M], in place of the flow's fixed noise


class ReferenceStream:
    """One stream; drop it at any time. `state` is a pytree, all that it remembers; None when it is finished."""

    def __init__(self, models: Models):
        self._models = models
        self.state = ReferenceState()

    @in_32_bits
    def push(self, codes: np.ndarray) -> np.ndarray:
        """Takes codes int [n] and returns the speech of the chunks that have become possible, float32 [samples].

        Raises:
            MossError: the stream is finished, codes out of range, or more than the flow's noise reaches.
        """
        self._check_open()
        self.state, chunks = advance(self._models, self.state, codes)
        return np.concatenate([np.zeros(0, np.float32), *(chunk.wave for chunk in chunks)])

    @in_32_bits
    def finish(self) -> np.ndarray:
        """The rest of the speech. Raises MossError when there were no codes, or when repeated."""
        self._check_open()
        chunk = close(self._models, self.state)
        self.state = None
        return chunk.wave

    def _check_open(self):
        if self.state is None:
            raise MossError("streaming: the stream is finished, codes that follow need a new one")


def seeded_noise(config: SpeechDecoderConfig, seed: int) -> Callable[[int, int], np.ndarray]:
    """Fresh noise for every chunk."""

    def draw(index: int, frames: int) -> np.ndarray:
        rows = sampler.bucket(frames, frames + 1024)
        noise = _draw(config.vocoder, rows)(np.uint32(seed), np.int32(index))
        return np.asarray(noise)[: frames * config.vocoder.hop]

    return draw


def advance(models: Models, state: ReferenceState, codes: np.ndarray) -> tuple[ReferenceState, list[Chunk]]:
    """Takes codes int [n] and returns every chunk that has become possible."""
    flow = models.flow_config
    codes = np.asarray(codes, np.int32)
    sampler.check_range(flow, codes)
    state = state.replace(codes=np.concatenate([state.codes, codes]))
    sampler.check_length(flow, len(models.voice.codes), len(state.codes))
    chunks = []
    while True:
        hop = flow.chunk + (-len(models.voice.codes) % flow.chunk if state.cursor == 0 else 0)
        end = state.cursor + hop + flow.lookahead
        if len(state.codes) < end:
            return state, chunks
        mel = sampler.decode(
            models.flow, flow, state.codes[:end], models.voice, streaming=True, finalize=False, buffer=models.buffer
        )
        cache, chunk = _vocode(models, state, np.asarray(mel[0]), end, last=False)
        state = state.replace(cursor=state.cursor + hop, chunks=state.chunks + 1, cache=cache)
        chunks.append(chunk)


def close(models: Models, state: ReferenceState) -> Chunk:
    """The last chunk: an offline decode of everything, of which the part that was not emitted is vocoded."""
    flow = models.flow_config
    mel = sampler.decode(models.flow, flow, state.codes, models.voice, buffer=models.buffer)
    return _vocode(models, state, np.asarray(mel[0]), len(state.codes), last=True)[1]


def _vocode(models: Models, state: ReferenceState, mel: np.ndarray, codes: int, last: bool):
    config = models.config
    cache = state.cache
    hop = config.vocoder.hop
    new = mel[state.cursor * config.flow.frames_per_code :]
    if cache is not None:
        new = np.concatenate([cache.mel, new])
    frames = len(new)
    noise = models.noise(state.chunks, frames)
    rows = sampler.bucket(frames, frames + 1024)
    start = np.zeros(0, np.float32) if cache is None else cache.source
    inputs = np.pad(new, ((0, rows - frames), (0, 0))), np.pad(noise, ((0, (rows - frames) * hop), (0, 0)))
    wave, source = _vocoder(config.vocoder)(models.vocoder, *inputs, np.int32(frames), start)
    wave = np.array(wave)[: frames * hop]
    source = np.asarray(source)[: frames * hop]
    held = config.mel_overlap * hop
    if cache is not None:
        window = np.hamming(2 * held).astype(np.float32)
        wave[:held] = wave[:held] * window[:held] + cache.speech * window[held:]
    if last:
        return None, Chunk(codes, state.cursor, mel, source, wave)
    cache = Cache(new[-config.mel_overlap :], source[-held:], wave[-held:])
    return cache, Chunk(codes, state.cursor, mel, source, wave[:-held])


@lru_cache(maxsize=4)
def _vocoder(config):
    def run(params, mel, noise, frames, source_start):
        with jax.default_matmul_precision("highest"):
            model = partial(HiFT(config).apply, {"params": params})
            wave, source = model(mel[None], noise[None], frames[None], source_start[None])
            return wave[0], source[0]

    return jax.jit(run)


@lru_cache(maxsize=16)
def _draw(config, frames: int):
    return jax.jit(lambda seed, index: sine_noise(config, jax.random.fold_in(jax.random.key(seed), index), 0, frames))

"""Streaming as in the released code: every chunk runs the flow on the prompt and all codes so far.

The product streams with `moss_jax.speech_decoder.stream`; this is for comparison with the reference. Every chunk
restarts the source signal, the weights of the cross-fade sum to up to 1.08, and the last chunk is the end of an offline
decode. Source: `CosyVoice2Model.token2wav`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from moss_jax.errors import MossError
from moss_jax.nn.precision import in_32_bits
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.decoder import SpeechDecoder, check_voice
from moss_jax.speech_decoder.flow import sampler
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.vocoder.config import VocoderConfig
from moss_jax.speech_decoder.vocoder.model import HiFT, sine_noise
from moss_jax.speech_decoder.voice import Voice


class Cache(struct.PyTreeNode):
    """The vocoder's state between chunks."""

    mel: np.ndarray  # float32 [overlap, M]
    source: np.ndarray  # float32 [overlap * hop]
    speech: np.ndarray  # float32 [overlap * hop], cross-faded already


class ReferenceState(struct.PyTreeNode):
    """The state of one stream; `ReferenceState()` is the initial one."""

    codes: np.ndarray = struct.field(default_factory=lambda: np.zeros(0, np.int32))  # int32 [N], all received so far
    cursor: int = 0  # codes whose mel has been emitted
    chunks: int = 0
    cache: Cache | None = None


class Chunk(NamedTuple):
    """The results of one call of flow and vocoder."""

    codes: int  # input codes of the flow
    cursor: int  # how many of them had their mel emitted by earlier chunks
    mel: np.ndarray  # float32 [4 * (codes - look-ahead), M], the flow's output
    source: np.ndarray  # float32 [samples], the vocoder's source signal
    wave: np.ndarray  # float32 [samples], the emitted part of the vocoder's output


class Models(NamedTuple):
    """Configs, parameters and inputs of a stream.

    `noise`: (chunk index, mel frames) -> float32 [frames * hop, harmonics].
    """

    config: SpeechDecoderConfig
    flow_config: FlowConfig  # with the chunk size
    flow: Any  # nested parameters of FlowModel
    vocoder: Any  # nested folded parameters of HiFT
    voice: Voice
    noise: Callable[[int, int], np.ndarray]
    buffer: np.ndarray | None = None  # float32 [1, T, M], replaces the flow's fixed noise


class ReferenceStream:
    """One stream. `state` is a pytree; None once the stream is finished."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.state: ReferenceState | None = ReferenceState()

    @in_32_bits
    def push(self, codes: np.ndarray) -> np.ndarray:
        """Takes codes int [N] and returns the speech of the chunks that they complete, float32 [samples].

        Raises:
            MossError: the stream is finished, a code is out of range, or there are more codes than the flow supports.
        """
        self.state, chunks = advance(self._models, self._open_state(), codes)
        return np.concatenate([np.zeros(0, np.float32), *(chunk.wave for chunk in chunks)])

    @in_32_bits
    def finish(self) -> np.ndarray:
        """Returns the rest of the speech, float32 [samples].

        Raises:
            MossError: the stream got no codes, or is finished already.
        """
        chunk = close(self._models, self._open_state())
        self.state = None
        return chunk.wave

    def _open_state(self) -> ReferenceState:
        if self.state is None:
            raise MossError("streaming: the stream is finished; start a new one for more codes")
        return self.state


def reference_stream(decoder: SpeechDecoder, voice: Voice, seed: int = 0, chunk: int | None = None) -> ReferenceStream:
    """A stream of `decoder`'s weights; arguments as for `SpeechDecoder.stream`."""
    check_voice(decoder.config, voice)
    stem, flow = decoder.config.streaming(chunk)
    config = replace(decoder.config, vocoder=decoder.vocoder_config)
    noise = seeded_noise(config, seed)
    return ReferenceStream(Models(config, flow, decoder.part(stem), decoder.vocoder_params, voice, noise))


def seeded_noise(config: SpeechDecoderConfig, seed: int) -> Callable[[int, int], np.ndarray]:
    """Noise drawn anew for every chunk."""

    def draw(index: int, frames: int) -> np.ndarray:
        rows = sampler.bucket(frames, frames + 1024)
        noise = _draw(config.vocoder, rows)(np.uint32(seed), np.int32(index))
        return np.asarray(noise)[: frames * config.vocoder.hop]

    return draw


def advance(models: Models, state: ReferenceState, codes: np.ndarray) -> tuple[ReferenceState, list[Chunk]]:
    """Takes codes int [N] and returns every chunk that they complete."""
    flow = models.flow_config
    codes = np.asarray(codes, np.int32)
    sampler.check_range(flow, codes)
    state = state.replace(codes=np.concatenate([state.codes, codes]))
    sampler.check_length(flow, len(models.voice.codes), len(state.codes))
    chunks: list[Chunk] = []
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
    """The last chunk: an offline decode of all codes, of which the part not emitted yet is vocoded."""
    flow = models.flow_config
    mel = sampler.decode(models.flow, flow, state.codes, models.voice, buffer=models.buffer)
    _, chunk = _vocode(models, state, np.asarray(mel[0]), len(state.codes), last=True)
    return chunk


def _vocode(
    models: Models, state: ReferenceState, mel: np.ndarray, codes: int, last: bool
) -> tuple[Cache | None, Chunk]:
    """The cache for the next chunk, None after the last one, and this chunk."""
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
    padded = np.pad(new, ((0, rows - frames), (0, 0)))
    noise = np.pad(noise, ((0, (rows - frames) * hop), (0, 0)))
    wave, source = _vocoder(config.vocoder)(models.vocoder, padded, noise, np.int32(frames), start)
    wave = np.array(wave)[: frames * hop]
    source = np.asarray(source)[: frames * hop]
    overlap = config.mel_overlap * hop
    if cache is not None:
        window = np.hamming(2 * overlap).astype(np.float32)
        wave[:overlap] = wave[:overlap] * window[:overlap] + cache.speech * window[overlap:]
    if last:
        return None, Chunk(codes, state.cursor, mel, source, wave)
    cache = Cache(new[-config.mel_overlap :], source[-overlap:], wave[-overlap:])
    return cache, Chunk(codes, state.cursor, mel, source, wave[:-overlap])


@lru_cache(maxsize=4)
def _vocoder(config: VocoderConfig) -> Any:
    def run(
        params: Any, mel: jax.Array, noise: jax.Array, frames: jax.Array, source_start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        with jax.default_matmul_precision("highest"):
            inputs = (mel[None], noise[None], frames[None], source_start[None])
            result: Any = HiFT(config).apply({"params": params}, *inputs)
        wave, source = result
        return wave[0], source[0]

    return jax.jit(run)


@lru_cache(maxsize=16)
def _draw(config: VocoderConfig, frames: int) -> Any:
    return jax.jit(lambda seed, index: sine_noise(config, jax.random.fold_in(jax.random.key(seed), index), 0, frames))

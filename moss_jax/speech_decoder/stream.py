"""Codes -> speech in a stream that computes every frame once: the cached flow, then the vocoder piece by piece.

Prompt and speech are one sequence of codes, divided into chunks. Each chunk gives one piece of mel, the first one only
its frames of speech. The result therefore depends on the codes alone, not on how they are divided among the calls.
"""

from functools import lru_cache
from typing import Any

import jax
import numpy as np

from moss_jax.errors import MossError
from moss_jax.nn.precision import in_32_bits
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.flow.stream import CachedFlow, Prompt
from moss_jax.speech_decoder.vocoder import stream as vocoder_stream
from moss_jax.speech_decoder.vocoder.config import VocoderConfig
from moss_jax.speech_decoder.vocoder.stream import VocoderState, emitted_frames


class CachedStream:
    """One stream, which may be abandoned at any time.

    Args:
        config: with the vocoder's weight norm folded.
        flow, prompt: the compiled flow and a voice that it prefilled; shared with other streams.
        vocoder: nested parameters of HiFT with folded weight norm.
        seed: of the noise in the vocoder's source.
    """

    def __init__(self, config: SpeechDecoderConfig, flow: CachedFlow, prompt: Prompt, vocoder: Any, seed: int) -> None:
        self._config = config
        self._params = vocoder
        self._seed = np.uint32(seed)
        self._flow = flow.stream(prompt)
        self._vocoder = vocoder_stream.init_state(config.vocoder, config.mel_overlap, config.mel_context)
        self._frames = 0
        self._finished = False
        self._prompt_frames = prompt.codes.size * config.flow.frames_per_code

    @property
    def state(self) -> dict[str, Any]:
        """The states of flow and vocoder, a pytree."""
        return {"flow": self._flow.state, "vocoder": self._vocoder}

    @in_32_bits
    def push(self, codes: np.ndarray) -> np.ndarray:
        """Takes codes int [N], N >= 0, and returns the speech that they complete, float32 [samples].

        Raises:
            MossError: the stream is finished, codes out of range, or more of them than the flow supports.
        """
        self._check_open()
        return self._vocode(self._flow.push(np.asarray(codes))[0], False)

    @in_32_bits
    def finish(self) -> np.ndarray:
        """Returns the rest of the speech, float32 [samples], and ends the stream.

        Raises:
            MossError: there were no codes, or the stream is finished already.
        """
        self._check_open()
        mel = self._flow.finish()[0]
        self._finished = True
        return self._vocode(mel, True)

    def _check_open(self) -> None:
        if self._finished:
            raise MossError("streaming: the stream is finished; start a new one for more codes")

    def _vocode(self, mel: np.ndarray, finishing: bool) -> np.ndarray:
        """The speech of the next frames of mel, [T, M], which are vocoded in pieces that end with the chunks."""
        config = self._config
        waves = [np.zeros(0, np.float32)]
        rows = self._flow.flow.config.chunk_frames
        step = _step(config.vocoder, config.mel_overlap)
        while len(mel):
            piece, mel = np.split(mel, [rows - (self._prompt_frames + self._frames) % rows])
            count = len(piece)
            last = finishing and not len(mel)
            padded = np.pad(piece, ((0, rows - count), (0, 0)))
            self._vocoder, wave = step(self._params, self._vocoder, padded, np.int32(count), last, self._seed)
            emitted_before = emitted_frames(self._frames, config.mel_overlap, False)
            self._frames += count
            emitted = emitted_frames(self._frames, config.mel_overlap, last)
            waves.append(np.asarray(wave)[: (emitted - emitted_before) * config.vocoder.hop])
        return np.concatenate(waves)


@lru_cache(maxsize=4)
def _step(config: VocoderConfig, overlap: int) -> Any:
    """`vocoder.stream.step`, compiled; donates the state."""

    def run(
        params: Any, state: VocoderState, mel: jax.Array, count: jax.Array, last: jax.Array, seed: jax.Array
    ) -> tuple[VocoderState, jax.Array]:
        with jax.default_matmul_precision("highest"):
            return vocoder_stream.step(params, config, overlap, state, mel, count, last, seed)

    return jax.jit(run, donate_argnums=1)

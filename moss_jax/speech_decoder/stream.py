"""Codes -> speech as they come, computing every frame once: the cached flow, then the vocoder piece by piece.

Prompt and speech are one sequence of codes, cut into chunks; each chunk gives one piece of mel, the first one only its
frames of speech. So what is computed depends on the codes alone and not on how they are delivered.
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
from moss_jax.speech_decoder.vocoder.stream import emitted_frames


class CachedStream:
    """One stream; drop it at any time. `state` is all that it remembers: of the flow and of the vocoder.

    Args:
        config: with the vocoder's weight norm folded.
        flow, prompt: the compiled flow and the voice that it prefilled; shared with other streams.
        vocoder: folded parameters of HiFT.
        seed: of the source's noise.
    """

    def __init__(self, config: SpeechDecoderConfig, flow: CachedFlow, prompt: Prompt, vocoder: Any, seed: int):
        self._config = config
        self._params = vocoder
        self._seed = np.uint32(seed)
        self._flow = flow.stream(prompt)
        self._vocoder = vocoder_stream.init_state(config.vocoder, config.mel_overlap, config.mel_context)
        self._frames = 0
        self._finished = False
        self._offset = prompt.codes.size * config.flow.frames_per_code  # of the speech in the sequence, in mel frames

    @property
    def state(self) -> dict[str, Any]:
        """A pytree."""
        return {"flow": self._flow.state, "vocoder": self._vocoder}

    @in_32_bits
    def push(self, codes: np.ndarray) -> np.ndarray:
        """Takes codes int [n], n >= 0, and returns the speech that they complete, float32 [samples].

        Raises:
            MossError: the stream is finished, codes out of range, or more than the flow's noise reaches.
        """
        self._check_open()
        return self._vocode(self._flow.push(np.asarray(codes))[0], False)

    @in_32_bits
    def finish(self) -> np.ndarray:
        """The rest of the speech, continued to the end. Raises MossError when there were no codes, or when repeated."""
        self._check_open()
        mel = self._flow.finish()[0]
        self._finished = True
        return self._vocode(mel, True)

    def _check_open(self):
        if self._finished:
            raise MossError("streaming: the stream is finished, codes that follow need a new one")

    def _vocode(self, mel: np.ndarray, finishing: bool) -> np.ndarray:
        config = self._config
        waves = [np.zeros(0, np.float32)]
        rows = self._flow.flow.config.chunk_frames
        step = _step(config.vocoder, config.mel_overlap)
        while len(mel):
            piece, mel = np.split(mel, [rows - (self._offset + self._frames) % rows])
            count = len(piece)
            last = finishing and not len(mel)
            padded = np.pad(piece, ((0, rows - count), (0, 0)))
            self._vocoder, wave = step(self._params, self._vocoder, padded, np.int32(count), last, self._seed)
            before = emitted_frames(self._frames, config.mel_overlap, False)
            self._frames += count
            samples = (emitted_frames(self._frames, config.mel_overlap, last) - before) * config.vocoder.hop
            waves.append(np.asarray(wave)[:samples])
        return np.concatenate(waves)


@lru_cache(maxsize=4)
def _step(config, overlap: int):
    def run(params, state, mel, count, last, seed):
        with jax.default_matmul_precision("highest"):
            return vocoder_stream.step(params, config, overlap, state, mel, count, last, seed)

    return jax.jit(run, donate_argnums=1)

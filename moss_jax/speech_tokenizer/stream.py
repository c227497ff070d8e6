"""Streams: codes of a recording that is still being made.

Every stage of the encoder is causal, so a stream of log-mel frames gives exactly the codes of the whole clip, however
the frames are divided (`LogMelStream`). Only the log-mel itself looks ahead: it raises all values to 8 (80 dB) below
the maximum of a 30 s segment, which a stream does not know yet. `WaveStream` takes the maximum so far instead, frame by
frame, starting from `start_peak` in each segment. Therefore

- the result does not depend on how the wave is divided;
- from the loudest frame of a segment on, the frames are those of the whole clip;
- before it, values more than 8 below the later maximum may be lower than in the whole clip, down to 8 below the maximum
  so far. These are pauses and the weakest bins of quiet beginnings; codes there can differ.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moss_jax.audio.features import limit, log10_mel
from moss_jax.errors import MossError
from moss_jax.nn.precision import in_32_bits
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import Encoder, EncoderState, init_state

StepCodes = tuple[jax.Array, int]  # codes int32 [1, chunk] of a step, and how many of them exist
START_PEAK = 1.0  # log10 of mel power; the peak of recorded speech is mostly between 0.4 and 1.9


class WaveState(struct.PyTreeNode):
    """The state of streams of waves: that of the encoder, and the maximum log10 mel power so far, float32 [B]."""

    encoder: EncoderState
    peak: jax.Array


def init_wave_state(config: SpeechTokenizerConfig, batch: int) -> WaveState:
    """The initial state of `batch` streams."""
    return WaveState(init_state(config, batch), jnp.full((batch,), -jnp.inf, jnp.float32))


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def log_mel_step(
    config: SpeechTokenizerConfig, params: Any, frames: jax.Array, valid: jax.Array, state: EncoderState
) -> tuple[jax.Array, EncoderState]:
    """`Encoder.step`, compiled: frames [B, T, M], valid int32 [B] -> (codes [B, T / frames_per_code], state)."""
    with jax.default_matmul_precision("highest"):
        result: Any = Encoder(config).apply({"params": params}, frames, valid, state, method="step")
    codes, new_state = result
    return codes, new_state


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def wave_step(
    config: SpeechTokenizerConfig,
    params: Any,
    samples: jax.Array,
    valid: jax.Array,
    start_peak: jax.Array,
    state: WaveState,
) -> tuple[jax.Array, WaveState]:
    """`log_mel_step` from samples.

    Args:
        samples: float32 [B, (T - 1) * hop + n_fft], the windows of T log-mel frames, the reflected samples at the ends
            of a segment included.
        valid: int32 [B], how many of the frames exist.
        start_peak: float32 scalar, the maximum log10 mel power that is assumed before the start of a segment.
        state: the result of the previous call, or `init_wave_state`.

    Returns:
        (codes int32 [B, T / frames_per_code], the new state)
    """
    new_segment = state.encoder.position % config.max_source_positions == 0
    previous = jnp.where(new_segment, start_peak, state.peak)
    frames, peak = running_log_mel(config, samples, previous)
    codes, encoder = log_mel_step(config, params, frames, valid, state.encoder)
    return codes, WaveState(encoder, peak)


def running_log_mel(config: SpeechTokenizerConfig, samples: jax.Array, peak: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-mel frames, each limited by the maximum so far.

    Args:
        samples: float32 [B, (T - 1) * hop + n_fft].
        peak: float32 [B], the maximum log10 mel power before these frames.

    Returns:
        (frames [B, T, M], the maximum after them [B])
    """
    frames = log10_mel(samples, config.mel)
    peaks = jax.lax.cummax(jnp.maximum(frames.max(2), peak[:, None]), axis=1)
    return limit(frames, peaks[..., None]), peaks[:, -1]


def check_wave(wave: np.ndarray, name: str) -> np.ndarray:
    """The wave as float32 [samples].

    Raises:
        MossError: it is not a one-dimensional array of finite floats. `name` starts the message.
    """
    wave = np.asarray(wave)
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise MossError(f"{name} is {wave.dtype} {list(wave.shape)}, expected floats [samples], mono, in [-1, 1]")
    if not np.isfinite(wave).all():
        raise MossError(f"{name} has NaN or infinite samples, expected finite numbers")
    return wave.astype(np.float32, copy=False)


class LogMelStream:
    """A stream of log-mel frames in any portions, which returns the codes of the whole clip.

    Args:
        chunk: codes in one compiled step, returned when all of their frames have been pushed. A larger chunk has a
            higher throughput, a smaller one a lower latency. A divisor of the codes of a segment.
    """

    @in_32_bits
    def __init__(self, config: SpeechTokenizerConfig, params: Any, *, chunk: int = 5) -> None:
        self.config = config
        self.params = params
        self.frames = _frames_per_step(config, chunk)
        self.state = init_state(config, 1)
        self._pending = np.zeros((0, config.num_mel_bins), np.float32)

    @in_32_bits
    def push(self, frames: np.ndarray) -> np.ndarray:
        """Takes float32 [T, M] and returns the codes that are ready, int32 [N]."""
        self._pending = np.concatenate([self._pending, np.asarray(frames, np.float32)])
        ready = len(self._pending) // self.frames * self.frames
        codes = [self._step(self._pending[start : start + self.frames]) for start in range(0, ready, self.frames)]
        self._pending = self._pending[ready:]
        return _joined(codes)

    @in_32_bits
    def finish(self) -> np.ndarray:
        """Returns the codes of the remaining frames, int32 [N]. The stream can be used for another clip then."""
        codes = _joined([self._step(self._pending)] if len(self._pending) else [])
        self.state = init_state(self.config, 1)
        self._pending = self._pending[:0]
        return codes

    def _step(self, frames: np.ndarray) -> StepCodes:
        padded = np.pad(frames, ((0, self.frames - len(frames)), (0, 0)))
        valid = jnp.array([len(frames)], jnp.int32)
        codes, self.state = log_mel_step(self.config, self.params, jnp.asarray(padded[None]), valid, self.state)
        return codes, -(-len(frames) // self.config.frames_per_code)


class WaveStream:
    """A stream of samples in any portions; the module's docstring says how its codes differ from the whole clip's.

    Args:
        chunk: codes in one compiled step, as in `LogMelStream`.
        start_peak: the maximum log10 mel power that is assumed at the start of a segment. If it is the true maximum of
            the segment or above, the floor is constant; if it is far below, the floor starts low and rises with the
            sound.
    """

    @in_32_bits
    def __init__(
        self, config: SpeechTokenizerConfig, params: Any, *, chunk: int = 5, start_peak: float = START_PEAK
    ) -> None:
        self.config = config
        self.params = params
        self.start_peak = jnp.float32(start_peak)
        self.frames = _frames_per_step(config, chunk)
        self.state = init_wave_state(config, 1)
        self._start_segment()

    @in_32_bits
    def push(self, wave: np.ndarray) -> np.ndarray:
        """Takes float32 [samples] at 16 kHz, mono, and returns the codes that are ready, int32 [N].

        Raises:
            MossError: the wave is not one-dimensional, or has NaN or infinite samples.
        """
        wave = check_wave(wave, "the pushed wave")
        codes: list[StepCodes] = []
        while len(wave):
            missing = self.config.samples_per_segment - self._received
            codes += self._extend(wave[:missing])
            wave = wave[missing:]
            if self._received == self.config.samples_per_segment:
                codes += self._finish_segment()
        return _joined(codes)

    @in_32_bits
    def finish(self) -> np.ndarray:
        """Returns the codes of the remaining samples, int32 [N]. The stream can be used for another clip then.

        In all there are ceil(samples / samples_per_code) codes for each segment.
        """
        codes = _joined(self._finish_segment() if self._received else [])
        self.state = init_wave_state(self.config, 1)
        return codes

    def _start_segment(self) -> None:
        self._received = 0  # samples of the segment
        self._frames_done = 0  # of the segment
        self._start_reflected = False  # whether the reflected samples are in front of the signal
        self._signal = np.zeros(0, np.float32)  # from the start of the next frame's window on

    def _extend(self, wave: np.ndarray) -> list[StepCodes]:
        """Adds samples of the same segment and runs the steps that they complete."""
        self._received += len(wave)
        self._signal = np.concatenate([self._signal, wave])
        half = self.config.n_fft // 2
        if not self._start_reflected:
            if len(self._signal) <= half:  # too few samples to reflect
                return []
            self._signal = np.concatenate([self._signal[half:0:-1], self._signal])
            self._start_reflected = True
        ready = 1 + (len(self._signal) - self.config.n_fft) // self.config.hop_length
        return self._steps(max(0, ready) // self.frames * self.frames)

    def _finish_segment(self) -> list[StepCodes]:
        """Pads and reflects the end of the segment and runs its last steps."""
        config = self.config
        codes = self._extend(np.zeros(-self._received % config.samples_per_code, np.float32))
        self._signal = np.concatenate([self._signal, self._signal[-2 : -config.n_fft // 2 - 2 : -1]])
        codes += self._steps(self._received // config.hop_length - self._frames_done)
        self._start_segment()
        return codes

    def _steps(self, count: int) -> list[StepCodes]:
        """Runs the next `count` frames, the last step padded."""
        config = self.config
        codes: list[StepCodes] = []
        width = (self.frames - 1) * config.hop_length + config.n_fft
        for start in range(0, count, self.frames):
            valid = min(self.frames, count - start)
            first = start * config.hop_length
            samples = self._signal[first : first + width]
            samples = np.pad(samples, (0, width - len(samples)))[None]
            new, self.state = wave_step(
                config,
                self.params,
                jnp.asarray(samples),
                jnp.array([valid], jnp.int32),
                self.start_peak,
                self.state,
            )
            codes.append((new, -(-valid // config.frames_per_code)))
        self._frames_done += count
        self._signal = self._signal[count * config.hop_length :]
        return codes


def _frames_per_step(config: SpeechTokenizerConfig, chunk: int) -> int:
    if chunk < 1 or config.codes_per_segment % chunk:
        raise MossError(f"chunk is {chunk}, expected a divisor of the {config.codes_per_segment} codes of a segment")
    return chunk * config.frames_per_code


def _joined(codes: list[StepCodes]) -> np.ndarray:
    """Waits for the steps and returns the codes that exist, int32 [N]."""
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(part)[0, :count] for part, count in codes)])

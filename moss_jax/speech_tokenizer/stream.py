"""Codes while the sound is still coming in.

Every stage of the encoder is causal, so a stream that is given the log-mel frames of a clip makes exactly the codes of
the whole clip, however the frames are cut (`LogMelStream`). Only one step of the log-mel itself looks ahead: it raises
everything to 8 (80 dB) below the loudest point of a 30 s segment, which a stream has not heard yet. `WaveStream` takes
the loudest point heard so far instead, frame by frame, beginning at `start_peak` in each segment. So

- how the wave is cut changes nothing here either;
- from the loudest frame of a segment on, the frames are those of the whole clip;
- before it, values more than 8 below the later maximum may lie lower than in the whole clip, down to 8 below the
  maximum until then. These are pauses and the emptiest bins of quiet beginnings; codes there can differ.
"""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.audio.features import limit, log10_mel
from moss_jax.errors import MossError
from moss_jax.nn.precision import in_32_bits
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import Encoder, EncoderState, init_state

START_PEAK = 1.0  # log10 of mel power; the peak of recorded speech is mostly between 0.4 and 1.9


@flax.struct.dataclass
class WaveState:
    """What a stream of waves remembers: the encoder's state and the loudest log10 mel power so far, float32 [B]."""

    encoder: EncoderState
    peak: jax.Array


def init_wave_state(config: SpeechTokenizerConfig, batch: int) -> WaveState:
    """The state of `batch` streams that have not begun."""
    return WaveState(init_state(config, batch), jnp.full((batch,), -jnp.inf, jnp.float32))


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def log_mel_step(config: SpeechTokenizerConfig, params: Any, frames: jax.Array, valid: jax.Array, state: EncoderState):
    """`Encoder.step`, compiled: frames [B, T, M], valid int32 [B] -> (codes [B, T / frames_per_code], state)."""
    with jax.default_matmul_precision("highest"):
        return Encoder(config).apply({"params": params}, frames, valid, state, method="step")


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def wave_step(
    config: SpeechTokenizerConfig,
    params: Any,
    samples: jax.Array,
    valid: jax.Array,
    start_peak: jax.Array,
    state: WaveState,
):
    """The same from samples.

    Args:
        samples: float32 [B, (T - 1) * hop + n_fft], the windows of T log-mel frames, the reflected samples at the ends
            of a segment included.
        valid: int32 [B], how many of the frames there are.
        start_peak: float32 scalar, the loudest log10 mel power that is assumed before a segment begins.
        state: as the last call left it.

    Returns:
        (codes int32 [B, T / frames_per_code], the state)
    """
    new_segment = state.encoder.position % config.max_source_positions == 0
    before = jnp.where(new_segment, start_peak, state.peak)
    frames, peak = running_log_mel(config, samples, before)
    codes, encoder = log_mel_step(config, params, frames, valid, state.encoder)
    return codes, WaveState(encoder, peak)


def running_log_mel(config: SpeechTokenizerConfig, samples: jax.Array, peak: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-mel frames limited by the loudest point up to each of them, and the loudest point so far.

    samples [B, (T - 1) * hop + n_fft], peak [B] before them -> (frames [B, T, M], peak [B]).
    """
    frames = log10_mel(samples, config.mel)
    peaks = jax.lax.cummax(jnp.maximum(frames.max(2), peak[:, None]), axis=1)
    return limit(frames, peaks[..., None]), peaks[:, -1]


def checked(wave: np.ndarray, name: str) -> np.ndarray:
    """The wave as float32 [samples]; MossError when it cannot be encoded."""
    wave = np.asarray(wave)
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise MossError(f"{name} is {wave.dtype} {list(wave.shape)}, expected floats [samples], mono, in [-1, 1]")
    if not np.isfinite(wave).all():
        raise MossError(f"{name} holds NaN or infinite samples, expected finite numbers")
    return wave.astype(np.float32, copy=False)


class LogMelStream:
    """Log-mel frames in any portions -> codes, those of the whole clip.

    Args:
        chunk: codes in one compiled step. They come out when all of their frames are there; a larger chunk is faster
            in all, a smaller one sooner. It divides the codes of a segment.
    """

    @in_32_bits
    def __init__(self, config: SpeechTokenizerConfig, params: Any, *, chunk: int = 5):
        self.config = config
        self.params = params
        self.frames = _frames_per_step(config, chunk)
        self.state = init_state(config, 1)
        self._rest = np.zeros((0, config.num_mel_bins), np.float32)

    @in_32_bits
    def push(self, frames: np.ndarray) -> np.ndarray:
        """Takes float32 [T, M] and returns the codes that are ready, int32 [N]."""
        self._rest = np.concatenate([self._rest, np.asarray(frames, np.float32)])
        ready = len(self._rest) // self.frames * self.frames
        codes = [self._step(self._rest[start : start + self.frames]) for start in range(0, ready, self.frames)]
        self._rest = self._rest[ready:]
        return _joined(codes)

    @in_32_bits
    def finish(self) -> np.ndarray:
        """The codes of the frames that are left, int32 [N]; the stream starts anew."""
        codes = _joined([self._step(self._rest)] if len(self._rest) else [])
        self.state = init_state(self.config, 1)
        self._rest = self._rest[:0]
        return codes

    def _step(self, frames: np.ndarray) -> tuple[jax.Array, int]:
        padded = np.pad(frames, ((0, self.frames - len(frames)), (0, 0)))
        valid = jnp.array([len(frames)], jnp.int32)
        codes, self.state = log_mel_step(self.config, self.params, jnp.asarray(padded[None]), valid, self.state)
        return codes, -(-len(frames) // self.config.frames_per_code)


class WaveStream:
    """Samples in any portions -> codes; the module's docstring says what differs from the whole clip.

    Args:
        chunk: codes in one compiled step, as in `LogMelStream`.
        start_peak: log10 mel power that counts as heard when a segment begins. At the segment's true maximum or above
            all of it, the floor is constant; far below it, the floor starts low and rises with the sound.
    """

    @in_32_bits
    def __init__(self, config: SpeechTokenizerConfig, params: Any, *, chunk: int = 5, start_peak: float = START_PEAK):
        self.config = config
        self.params = params
        self.start_peak = jnp.float32(start_peak)
        self.frames = _frames_per_step(config, chunk)
        self.state = init_wave_state(config, 1)
        self._begin()

    @in_32_bits
    def push(self, wave: np.ndarray) -> np.ndarray:
        """Takes float32 [samples] at 16 kHz, mono, and returns the codes that are ready, int32 [N].

        Raises:
            MossError: the wave is not one-dimensional, or holds NaN or infinite samples.
        """
        wave = checked(wave, "the pushed wave")
        codes = []
        while len(wave):
            room = self.config.samples_per_segment - self._received
            codes += self._take(wave[:room])
            wave = wave[room:]
            if self._received == self.config.samples_per_segment:
                codes += self._close()
        return _joined(codes)

    @in_32_bits
    def finish(self) -> np.ndarray:
        """The codes of what is left, int32 [N]: in all ceil(samples / samples_per_code) in each segment; the stream
        starts anew."""
        codes = _joined(self._close() if self._received else [])
        self.state = init_wave_state(self.config, 1)
        return codes

    def _begin(self) -> None:
        """A new segment: nothing received, no frame done, `_signal` begins where the window of the next frame does."""
        self._received = self._done = 0
        self._opened = False
        self._signal = np.zeros(0, np.float32)

    def _take(self, wave: np.ndarray) -> list[tuple[jax.Array, int]]:
        self._received += len(wave)
        self._signal = np.concatenate([self._signal, wave])
        half = self.config.n_fft // 2
        if not self._opened:
            if len(self._signal) <= half:  # too few samples to reflect
                return []
            self._signal = np.concatenate([self._signal[half:0:-1], self._signal])
            self._opened = True
        ready = 1 + (len(self._signal) - self.config.n_fft) // self.config.hop_length
        return self._steps(max(0, ready) // self.frames * self.frames)

    def _close(self) -> list[tuple[jax.Array, int]]:
        """Pads and reflects the end of the segment and makes its last codes."""
        config = self.config
        received = self._received
        codes = self._take(np.zeros(-received % config.samples_per_code, np.float32))
        self._signal = np.concatenate([self._signal, self._signal[-2 : -config.n_fft // 2 - 2 : -1]])
        codes += self._steps(self._received // config.hop_length - self._done)
        self._begin()
        return codes

    def _steps(self, count: int) -> list[tuple[jax.Array, int]]:
        """Runs the next `count` frames, the last step padded."""
        config = self.config
        codes = []
        width = (self.frames - 1) * config.hop_length + config.n_fft
        for start in range(0, count, self.frames):
            valid = min(self.frames, count - start)
            first = start * config.hop_length
            samples = self._signal[first : first + width]
            samples = jnp.asarray(np.pad(samples, (0, width - len(samples)))[None])
            step = wave_step(config, self.params, samples, jnp.array([valid], jnp.int32), self.start_peak, self.state)
            self.state = step[1]
            codes.append((step[0], -(-valid // config.frames_per_code)))
        self._done += count
        self._signal = self._signal[count * config.hop_length :]
        return codes


def _frames_per_step(config: SpeechTokenizerConfig, chunk: int) -> int:
    if chunk < 1 or config.codes_per_segment % chunk:
        raise MossError(f"chunk is {chunk}, expected a divisor of the {config.codes_per_segment} codes of a segment")
    return chunk * config.frames_per_code


def _joined(codes: list[tuple[jax.Array, int]]) -> np.ndarray:
    """Waits for the steps that have been started and keeps the codes that count."""
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(part)[0, :count] for part, count in codes)])

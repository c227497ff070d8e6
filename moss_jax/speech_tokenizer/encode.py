"""Waves -> codes: any number of clips of any length, through a few compiled shapes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moss_jax.audio.features import log_mel_16k
from moss_jax.audio.wave import segments
from moss_jax.checkpoint.component import MODEL_FILE
from moss_jax.nn.precision import in_32_bits
from moss_jax.sharding import make_mesh
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import Encoder
from moss_jax.speech_tokenizer.stream import START_PEAK, WaveStream, check_wave

MAX_SEGMENTS = 128  # in one call, as in the reference
SEGMENT_LENGTHS = (1, 2, 4, 6, 8, 12, 16)  # compiled lengths, in sixteenths of a segment
# A call whose rows are at least this full is made at once; otherwise one of half the rows is made first. The worst
# padding of a batch is then a third of its segments.
MIN_FILLED = 0.75


@partial(jax.jit, static_argnums=0)
def encode_padded(config: SpeechTokenizerConfig, params: Any, waves: jax.Array, lengths: jax.Array) -> jax.Array:
    """Codes of a batch of segments.

    Args:
        params: nested parameters of `Encoder`.
        waves: float32 [B, samples], zero-padded on the right to a multiple of `config.samples_per_code`.
        lengths: int32 [B], multiples of the same: the samples of each wave with which its log-mel is computed
            (`log_mel_16k`), its zero padding to a whole code included.

    Returns:
        int32 [B, samples / samples_per_code]; those after a segment's own samples are undefined.
    """
    with jax.default_matmul_precision("highest"):
        codes = Encoder(config).apply({"params": params}, log_mel_16k(waves, lengths, config.mel))
    assert isinstance(codes, jax.Array)  # `apply` may also return updated variables
    return codes


class _Call(NamedTuple):
    """One call of `encode_padded`."""

    segments: list[int]  # indices of the segments in it
    codes: int  # compiled length
    rows: int  # compiled batch size


class SpeechTokenizer:
    """Speech -> codes.

    Args:
        config: sizes.
        params: nested parameters of `Encoder`.
        max_seconds: audio in one compiled call, padding included; bounds the memory on a device.
        devices: the segments of a call are divided among them; None: the default device.
    """

    def __init__(
        self,
        config: SpeechTokenizerConfig,
        params: Any,
        *,
        max_seconds: float = 240.0,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self.config = config
        self.params = params
        self.max_seconds = max_seconds
        self._device_count = len(devices) if devices else 1
        self._sharding = None
        if self._device_count > 1:
            mesh = make_mesh(data=self._device_count, devices=devices)
            self._sharding = NamedSharding(mesh, PartitionSpec("data"))
            self.params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    @classmethod
    @in_32_bits
    def load(cls, folder: str | Path, *, devices: Sequence[jax.Device] | None = None) -> "SpeechTokenizer":
        """Reads `config.json` and `model.safetensors` in the `speech_tokenizer` folder of a converted system.

        Raises:
            MossError: a file is missing or unreadable, or the two do not fit together.
        """
        config, params = SPEECH_TOKENIZER.load(folder)
        return cls(config, params[MODEL_FILE], devices=devices)

    def stream(self, *, chunk: int = 5, start_peak: float = START_PEAK) -> WaveStream:
        """A stream that takes samples and returns codes; arguments as for `WaveStream`."""
        return WaveStream(self.config, self.params, chunk=chunk, start_peak=start_peak)

    @in_32_bits
    def encode(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes of clips of any length, each the same as if it were encoded alone.

        A clip is cut into segments of 30 s that are encoded independently; segments of similar length share a call.

        Args:
            waves: float32 [samples] each, mono, at `config.sample_rate`.

        Returns:
            For each clip int32 [N], ceil(samples / samples_per_code) codes for each of its segments; none for no
            samples.

        Raises:
            MossError: a wave is not one-dimensional, or has NaN or infinite samples.
        """
        pieces: list[np.ndarray] = []
        owners: list[int] = []  # of each piece, the index of its wave
        for owner, wave in enumerate(waves):
            parts = segments(check_wave(wave, f"wave {owner}"), self.config.samples_per_segment)
            pieces += parts
            owners += [owner] * len(parts)
        counts = [-(-len(piece) // self.config.samples_per_code) for piece in pieces]
        calls = self._plan(counts)
        results = [self._run(call, pieces, counts) for call in calls]  # all are started before the first is waited for
        codes: dict[int, np.ndarray] = {}
        for call, result in zip(calls, results, strict=True):
            for row, index in zip(np.asarray(result), call.segments, strict=False):
                codes[index] = row[: counts[index]]
        of_waves: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in waves]
        for index, owner in enumerate(owners):
            of_waves[owner].append(codes[index])
        return [np.concatenate(parts) for parts in of_waves]

    def _plan(self, counts: Sequence[int]) -> list[_Call]:
        """The calls for segments of these lengths in codes."""
        per_segment = self.config.codes_per_segment
        sizes = sorted({-(-sixteenths * per_segment // 16) for sixteenths in SEGMENT_LENGTHS})
        groups: dict[int, list[int]] = {}
        for index, count in enumerate(counts):
            groups.setdefault(next(size for size in sizes if size >= count), []).append(index)
        plan = []
        for size, indices in groups.items():
            seconds = size / self.config.code_rate
            max_per_device = 1 << int(np.log2(max(1, min(MAX_SEGMENTS, self.max_seconds // seconds))))
            while indices:
                # Powers of two, so that few batch sizes are compiled.
                per_device = min(-(-len(indices) // self._device_count), max_per_device)
                per_device = 1 << (per_device - 1).bit_length()
                if per_device > 1 and len(indices) < MIN_FILLED * per_device * self._device_count:
                    per_device //= 2
                rows = per_device * self._device_count
                plan.append(_Call(indices[:rows], size, rows))
                indices = indices[rows:]
        return plan

    def _run(self, call: _Call, pieces: Sequence[np.ndarray], counts: Sequence[int]) -> jax.Array:
        unit = self.config.samples_per_code
        waves = np.zeros((call.rows, call.codes * unit), np.float32)
        lengths = np.full(call.rows, call.codes * unit, np.int32)
        for row, index in enumerate(call.segments):
            waves[row, : len(pieces[index])] = pieces[index]
            lengths[row] = counts[index] * unit
        inputs: tuple[Any, Any] = (waves, lengths)
        if self._sharding is not None:
            inputs = jax.device_put(inputs, self._sharding)
        codes: jax.Array = encode_padded(self.config, self.params, *inputs)
        return codes

"""Waves -> codes: clips of any length and number through few compiled shapes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
from moss_jax.speech_tokenizer.stream import START_PEAK, WaveStream, checked

MAX_SEGMENTS = 128  # in one call, as in the reference
SEGMENT_LENGTHS = (1, 2, 4, 6, 8, 12, 16)  # compiled lengths, in sixteenths of a segment


@partial(jax.jit, static_argnums=0)
def encode_padded(config: SpeechTokenizerConfig, params: Any, waves: jax.Array, lengths: jax.Array) -> jax.Array:
    """Codes of a batch of segments.

    Args:
        waves: float32 [B, L], zero-padded on the right to L, a multiple of `config.samples_per_code`.
        lengths: int32 [B], multiples of the same: where each wave's zero padding is taken to end (`log_mel_16k`).

    Returns:
        int32 [B, L / samples_per_code]; those after a segment's own samples are meaningless.
    """
    with jax.default_matmul_precision("highest"):
        return Encoder(config).apply({"params": params}, log_mel_16k(waves, lengths, config.mel))


class SpeechTokenizer:
    """Speech -> codes.

    Args:
        config: sizes.
        params: nested dictionary of the encoder's parameters.
        max_seconds: audio on a device in one compiled call, padding included; bounds the memory of long clips.
        devices: a call's segments are divided among them; default: one device.
    """

    def __init__(
        self,
        config: SpeechTokenizerConfig,
        params: Any,
        *,
        max_seconds: float = 240.0,
        devices: Sequence[jax.Device] | None = None,
    ):
        self.config = config
        self.params = params
        self.max_seconds = max_seconds
        self._ways = len(devices or [None])
        self._by_rows = None
        if self._ways > 1:
            mesh = make_mesh(data=self._ways, devices=devices)
            self._by_rows = NamedSharding(mesh, PartitionSpec("data"))
            self.params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    @classmethod
    @in_32_bits
    def load(cls, folder: str | Path, *, devices: Sequence[jax.Device] | None = None) -> "SpeechTokenizer":
        """Reads `config.json` and `model.safetensors` in the `speech_tokenizer` folder of a converted system.

        Raises:
            MossError: something is missing there, unreadable, or does not fit together.
        """
        config, params = SPEECH_TOKENIZER.load(folder)
        return cls(config, params[MODEL_FILE], devices=devices)

    def stream(self, *, chunk: int = 5, start_peak: float = START_PEAK) -> WaveStream:
        """A stream of samples in, codes out; see there."""
        return WaveStream(self.config, self.params, chunk=chunk, start_peak=start_peak)

    @in_32_bits
    def encode(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes of clips of any length, each the same as if it were encoded alone.

        A clip is cut into segments of 30 s that know nothing of each other; segments of similar length share a call.

        Args:
            waves: float32 [samples] each, mono, at `config.sample_rate`.

        Returns:
            For each clip int32 [ceil(samples / samples_per_code)], counted segment by segment; none for no samples.

        Raises:
            MossError: a wave is not one-dimensional, or holds NaN or infinite samples.
        """
        config = self.config
        unit = self.config.samples_per_code
        parts: list[np.ndarray] = []
        owners: list[int] = []
        for owner, wave in enumerate(waves):
            pieces = segments(checked(wave, f"wave {owner}"), config.samples_per_segment)
            parts += pieces
            owners += [owner] * len(pieces)
        counts = [-(-len(part) // unit) for part in parts]
        codes: list = [None] * len(parts)
        calls = [
            (members, self._call(parts, counts, members, size, rows)) for members, size, rows in self._plan(counts)
        ]
        for members, result in calls:  # all calls are under way before the first one is waited for
            result = np.asarray(result)
            for row, member in enumerate(members):
                codes[member] = result[row, : counts[member]]
        joined: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in waves]
        for owner, part in zip(owners, codes, strict=True):
            joined[owner].append(part)
        return [np.concatenate(pieces) for pieces in joined]

    def _plan(self, counts: Sequence[int]) -> list[tuple[list[int], int, int]]:
        """[(members, compiled length in codes, compiled rows)] for segments of these lengths in codes."""
        per_segment = self.config.codes_per_segment
        sizes = sorted({-(-sixteenths * per_segment // 16) for sixteenths in SEGMENT_LENGTHS})
        groups: dict[int, list[int]] = {}
        for member, count in enumerate(counts):
            groups.setdefault(next(size for size in sizes if size >= count), []).append(member)
        plan = []
        for size, members in groups.items():
            seconds = size / self.config.code_rate
            most = 1 << int(np.log2(max(1, min(MAX_SEGMENTS, self.max_seconds // seconds))))
            while members:
                each = 1 << (min(-(-len(members) // self._ways), most) - 1).bit_length()
                if each > 1 and len(members) < 0.75 * each * self._ways:  # rather a smaller call more than that padding
                    each //= 2
                rows = each * self._ways
                plan.append((members[:rows], size, rows))
                members = members[rows:]
        return plan

    def _call(self, parts, counts, members, size: int, rows: int) -> jax.Array:
        unit = self.config.samples_per_code
        batch = np.zeros((rows, size * unit), np.float32)
        lengths = np.full(rows, size * unit, np.int32)
        for row, member in enumerate(members):
            batch[row, : len(parts[member])] = parts[member]
            lengths[row] = counts[member] * unit
        if self._by_rows is None:
            return encode_padded(self.config, self.params, jnp.asarray(batch), jnp.asarray(lengths))
        return encode_padded(self.config, self.params, *jax.device_put((batch, lengths), self._by_rows))

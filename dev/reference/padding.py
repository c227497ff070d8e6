"""Waves -> codes with the padding of the released code.

It pads each 128 consecutive segments to the longest of them, so that the last code of a shorter segment depends on its
neighbours. With `SpeechTokenizer.encode` the codes of a clip do not depend on other clips.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from moss_jax.audio.wave import segments
from moss_jax.nn.precision import in_32_bits
from moss_jax.speech_tokenizer.encode import SpeechTokenizer, encode_padded

SEGMENTS_PER_BATCH = 128


@in_32_bits
def encode(speech_tokenizer: SpeechTokenizer, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes of waves float32 [samples] at 16 kHz: for each int32 [ceil(samples / samples_per_code)]."""
    config = speech_tokenizer.config
    unit = config.samples_per_code
    pieces = []
    owners = []
    for owner, wave in enumerate(waves):
        for piece in segments(wave, config.samples_per_segment):
            pieces.append(piece)
            owners.append(owner)
    codes: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in waves]
    for first in range(0, len(pieces), SEGMENTS_PER_BATCH):
        batch = pieces[first : first + SEGMENTS_PER_BATCH]
        counts = [-(-len(piece) // unit) for piece in batch]
        padded = max(counts) * unit
        rows = np.stack([np.pad(piece, (0, padded - len(piece))) for piece in batch])
        lengths = jnp.full(len(batch), padded, jnp.int32)
        encoded = np.asarray(encode_padded(config, speech_tokenizer.params, jnp.asarray(rows), lengths))
        for owner, row, count in zip(owners[first:], encoded, counts, strict=False):
            codes[owner].append(row[:count])
    return [np.concatenate(parts) for parts in codes]

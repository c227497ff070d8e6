"""The arithmetic of a training step, for MFU and for step times that nobody has measured.

Counted are the products that the mathematics needs, 2 FLOP a multiply-add; what remat computes again is not counted
(so an MFU is of the model's FLOP, not the hardware's), nor are norms, RoPE, softmax and table look-ups. For one token:

    a kernel of P entries     forward 2 P; gradient of its input 2 P where something before it trains; its own gradient
                              2 P where it trains
    an adapter of P entries   6 P
    attention of one layer    4 A N H forward, twice that backward where a gradient passes; A is the mean number of rows
                              that a row sees (half of the context for whole rows), N H all query heads

Rows of padding count as tokens: they are computed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.train.speech_lm.lora import PREFIX
from moss_jax.train.speech_lm.stages import Stage, stage_shapes

# Dense bfloat16 FLOP/s of one device by a part of its name (`device_kind`), as the makers state them.
PEAK_FLOPS = {
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v5": 459e12,
    "v4": 275e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "4090": 165e12,
    "B200": 2250e12,
}


def peak_flops(kind: str) -> float | None:
    """FLOP/s of a device by its `device_kind`; None for one that is not known (a CPU)."""
    return next((value for name, value in PEAK_FLOPS.items() if name in kind), None)


def token_flops(config: SpeechLMConfig, stage: Stage, attended: float) -> float:
    """FLOP of one training step for one token; `attended` is the mean number of rows that a row sees."""
    trainable, frozen = stage_shapes(config, stage)
    heads = config.num_attention_heads * config.head_dim
    total = 0.0

    def block(name: str, below: bool) -> bool:
        """Adds a stack of layers; returns whether a gradient passes what stands on it."""
        nonlocal total
        layers = f"{name}/layers/"
        adapters = _size(trainable, f"{PREFIX}{name}/layers/")
        passes = below or adapters > 0
        fixed = _size(frozen, layers, "/kernel")
        trained = _size(trainable, layers, "/kernel")
        fixed_depth = _depth(frozen, layers)
        trained_depth = _depth(trainable, layers)
        total += fixed * (4 if passes else 2) + trained * 6 + adapters * 6
        total += 4 * attended * heads * (fixed_depth * (3 if passes else 1) + trained_depth * 3)
        return passes or trained > 0

    below = any(path in trainable for path in ("text/embed/embedding", "audio/embed/embedding"))
    if config.num_shared_layers:
        below = block("shared", below)
    for name in ("text", "audio") if config.audio_vocab_size else ("text",):
        passes = block(name, below)
        total += _size(trainable, f"{name}/head/") * 6 + _size(frozen, f"{name}/head/") * (4 if passes else 2)
    return total


def step_flops(config: SpeechLMConfig, stage: Stage, tokens: int, context: int) -> float:
    """FLOP of a step over `tokens` rows in sequences of `context` rows without packing."""
    return tokens * token_flops(config, stage, context / 2)


def _size(shapes: Mapping[str, Any], prefix: str, suffix: str = "") -> int:
    return sum(int(np.prod(s.shape)) for p, s in shapes.items() if p.startswith(prefix) and p.endswith(suffix))


def _depth(shapes: Mapping[str, jax.ShapeDtypeStruct], prefix: str) -> int:
    return next((s.shape[0] for p, s in shapes.items() if p.startswith(prefix) and p.endswith("/q/kernel")), 0)

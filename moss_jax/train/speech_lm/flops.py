"""FLOP of a training step, for MFU and for estimates of step times.

Matrix products count 2 FLOP per multiply-add. Recomputation by remat is not counted (an MFU is of the model's FLOP, not
the hardware's), nor are norms, RoPE, softmax and table look-ups. For one token:

    a kernel of P entries     forward 2 P; gradient of its input 2 P if something before it trains; its own gradient
                              2 P if it trains
    an adapter of P entries   6 P
    attention of one layer    4 A N H forward, twice that backward if a gradient passes through it; A is the mean number
                              of rows that a row attends to (half of the context for whole rows), N H all query heads

Rows of padding count as tokens, since they are computed as well.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.train.speech_lm.lora import PREFIX
from moss_jax.train.speech_lm.stages import Stage, stage_shapes

# Dense bfloat16 FLOP/s of one device by a part of its name (`device_kind`), from the makers' data sheets. The first
# match counts, so longer names come before their prefixes.
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
    """FLOP/s of a device by its `device_kind`; None for an unknown one (a CPU)."""
    return next((value for name, value in PEAK_FLOPS.items() if name in kind), None)


def token_flops(config: SpeechLMConfig, stage: Stage, attended: float) -> float:
    """FLOP of one training step for one token; `attended` is the mean number of rows that a row attends to."""
    trainable, frozen = stage_shapes(config, stage)
    heads = config.num_attention_heads * config.head_dim
    total = 0.0

    def add_stack(name: str, input_trains: bool) -> bool:
        """Adds a stack of layers; returns whether a gradient passes through the modules after it."""
        nonlocal total
        layers = f"{name}/layers/"
        adapters = _size(trainable, PREFIX + layers)
        has_gradient = input_trains or adapters > 0
        frozen_size = _size(frozen, layers, "/kernel")
        trainable_size = _size(trainable, layers, "/kernel")
        frozen_depth = _depth(frozen, layers)
        trainable_depth = _depth(trainable, layers)
        total += frozen_size * (4 if has_gradient else 2) + trainable_size * 6 + adapters * 6
        total += 4 * attended * heads * (frozen_depth * (3 if has_gradient else 1) + trainable_depth * 3)
        return has_gradient or trainable_size > 0

    input_trains = any(path in trainable for path in ("text/embed/embedding", "audio/embed/embedding"))
    if config.num_shared_layers:
        input_trains = add_stack("shared", input_trains)
    for channel in config.channels:
        head = f"{channel.name}/head/"
        has_gradient = add_stack(channel.name, input_trains)
        total += _size(trainable, head) * 6 + _size(frozen, head) * (4 if has_gradient else 2)
    return total


def step_flops(config: SpeechLMConfig, stage: Stage, tokens: int, context: int) -> float:
    """FLOP of a step over `tokens` rows in sequences of `context` rows without packing."""
    return tokens * token_flops(config, stage, context / 2)


def _size(shapes: Mapping[str, Any], prefix: str, suffix: str = "") -> int:
    return sum(int(np.prod(s.shape)) for p, s in shapes.items() if p.startswith(prefix) and p.endswith(suffix))


def _depth(shapes: Mapping[str, jax.ShapeDtypeStruct], prefix: str) -> int:
    return next((s.shape[0] for p, s in shapes.items() if p.startswith(prefix) and p.endswith("/q/kernel")), 0)

"""FLOP of a training step by arithmetic: 6 per entry of a kernel and position it is applied to, without attention."""

from math import prod

import numpy as np

from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.model import flow_shapes
from moss_jax.speech_decoder.vocoder import VocoderConfig, vocoder_shapes

CODE_RATE = ("encoder/embedding", "encoder/lookahead", "encoder/layers")
NOT_COUNTED = ("codes/", "speaker/", "time/")  # a table, and what is computed once per recording


def flow_flops(config: FlowConfig, codes: int) -> float:
    """FLOP for a batch of `codes` codes."""
    total = 0
    for path, shape in flow_shapes(config).items():
        if len(shape.shape) > 1 and not path.startswith(NOT_COUNTED):
            positions = codes if path.startswith(CODE_RATE) else codes * config.frames_per_code
            total += int(np.prod(shape.shape)) * positions
    return 6.0 * total


def vocoder_flops(config: VocoderConfig, frames: int) -> float:
    """FLOP of the generator for a batch of `frames` mel frames."""
    total = 0
    resblocks = len(config.resblock_widths)  # per upsampling stage
    for path, shape in vocoder_shapes(config).items():
        name, _, index = path.partition("/")[0].rpartition("_")
        if path.endswith(("/v", "/kernel")):
            rate = 1
            if name in ("ups", "source_downs", "source_resblocks", "resblocks"):
                stage = int(index) // resblocks if name == "resblocks" else int(index)
                rate = prod(config.upsample_rates[: stage + (name != "ups")])
            elif path.startswith("conv_post"):
                rate = prod(config.upsample_rates)
            total += int(np.prod(shape.shape)) * rate * frames
    return 6.0 * total

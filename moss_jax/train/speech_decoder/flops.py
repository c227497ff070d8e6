"""FLOP of a training step by arithmetic: 6 for each entry of a kernel and each of its places, without attention."""

from math import prod

import numpy as np

from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.model import flow_shapes
from moss_jax.speech_decoder.vocoder import VocoderConfig, vocoder_shapes

AT_CODES = ("encoder/embedding", "encoder/lookahead", "encoder/layers")
ELSEWHERE = ("codes/", "speaker/", "time/")  # a table, and what is computed once a recording


def flow_flops(config: FlowConfig, codes: int) -> float:
    """Of a batch of so many codes."""
    total = 0
    for path, shape in flow_shapes(config).items():
        if len(shape.shape) > 1 and not path.startswith(ELSEWHERE):
            places = codes if path.startswith(AT_CODES) else codes * config.frames_per_code
            total += int(np.prod(shape.shape)) * places
    return 6.0 * total


def vocoder_flops(config: VocoderConfig, frames: int) -> float:
    """Of the generator, for a batch of so many mel frames."""
    total = 0
    count = len(config.resblock_widths)
    for path, shape in vocoder_shapes(config).items():
        name, _, place = path.partition("/")[0].rpartition("_")
        if path.endswith(("/v", "/kernel")):
            rate = 1
            if name in ("ups", "source_downs", "source_resblocks", "resblocks"):
                stage = int(place) // count if name == "resblocks" else int(place)
                rate = prod(config.upsample_rates[: stage + (name != "ups")])
            elif path.startswith("conv_post"):
                rate = prod(config.upsample_rates)
            total += int(np.prod(shape.shape)) * rate * frames
    return 6.0 * total

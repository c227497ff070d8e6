"""The models that a system is made of: flat shapes of their parameters, with nothing computed.

Tracing a model takes about a second, and a conversion asks several times: what was found is kept.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from moss_jax.convert.language_model import model_shapes
from moss_jax.nn.tree import param_shapes
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.speaker import CAMPPlus, SpeakerConfig
from moss_jax.speech_decoder.vocoder import HiFT, VocoderConfig
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import Encoder

Shapes = Mapping[str, Any]


@cache
def tokenizer_shapes(config: SpeechTokenizerConfig) -> Shapes:
    frames = jax.ShapeDtypeStruct((1, config.frames_per_code, config.num_mel_bins), jnp.float32)
    return param_shapes(Encoder(config), frames)


@cache
def flow_shapes(config: FlowConfig) -> Shapes:
    return param_shapes(FlowModel(config))


@cache
def vocoder_shapes(config: VocoderConfig) -> Shapes:
    """With weight norm in two parts, as it is stored."""
    mel = jax.ShapeDtypeStruct((1, 4, config.mel_bins), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, 4 * config.hop, config.harmonics), jnp.float32)
    return param_shapes(HiFT(config), mel, noise)


@cache
def speaker_shapes(config: SpeakerConfig) -> Shapes:
    return param_shapes(CAMPPlus(config), jax.ShapeDtypeStruct((1, 200, config.num_mel_bins), jnp.float32))


__all__ = ["flow_shapes", "model_shapes", "speaker_shapes", "tokenizer_shapes", "vocoder_shapes"]

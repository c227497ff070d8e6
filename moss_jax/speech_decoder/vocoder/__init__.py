"""The vocoder: log-mel -> waveform, whole (`HiFT`) or piece by piece (`stream.step`)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jax.speech_decoder.vocoder.config import VocoderConfig
    from moss_jax.speech_decoder.vocoder.model import HiFT, fold_weight_norm, vocoder_shapes

__all__ = ["HiFT", "VocoderConfig", "fold_weight_norm", "vocoder_shapes"]

PUBLIC = {
    "HiFT": "model",
    "VocoderConfig": "config",
    "fold_weight_norm": "model",
    "vocoder_shapes": "model",
}


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(f"moss_jax.speech_decoder.vocoder.{PUBLIC[name]}"), name)
    raise AttributeError(f"module 'moss_jax.speech_decoder.vocoder' has no attribute {name!r}")

"""The language model: Qwen3 layers, layer-split into a shared block and two branches, with an explicit KV cache."""

from moss_jax.nn.qwen3 import KVCache
from moss_jax.speech_lm.config import MOSS_SPEECH_8B, QWEN3_8B, TINY, Channel, SpeechLMConfig
from moss_jax.speech_lm.model import LayerSplitModel, init_cache, model_axes, model_shapes

__all__ = [
    "MOSS_SPEECH_8B",
    "QWEN3_8B",
    "TINY",
    "Channel",
    "KVCache",
    "LayerSplitModel",
    "SpeechLMConfig",
    "init_cache",
    "model_axes",
    "model_shapes",
]

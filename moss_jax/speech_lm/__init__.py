"""The language model: Qwen3 layers, layer-split into a shared block and two branches, with an explicit KV cache."""

from moss_jax.speech_lm.cache import KVCache, init_cache
from moss_jax.speech_lm.config import MOSS_SPEECH_8B, QWEN3_8B, TINY, SpeechLMConfig
from moss_jax.speech_lm.model import LayerSplitModel, model_axes, model_shapes

__all__ = [
    "MOSS_SPEECH_8B",
    "QWEN3_8B",
    "TINY",
    "KVCache",
    "LayerSplitModel",
    "SpeechLMConfig",
    "init_cache",
    "model_axes",
    "model_shapes",
]

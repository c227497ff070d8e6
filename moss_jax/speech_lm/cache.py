"""The key/value cache: one for each block of layers, all of one length, written at one shared column."""

import jax
import jax.numpy as jnp
from flax import struct

from moss_jax.sharding import constrain
from moss_jax.speech_lm.config import SpeechLMConfig

CACHE_AXES = ("layers", "batch", None, "kv_heads", "head_dim")


@struct.dataclass
class KVCache:
    """Keys (after norm and RoPE) and values of one block: k, v [L, B, S, K, H], S columns of capacity."""

    k: jax.Array
    v: jax.Array

    def write(self, k: jax.Array, v: jax.Array, index: jax.Array) -> "KVCache":
        """The cache with k, v [L, B, T, K, H] in columns index .. index+T-1; index + T must not exceed S."""
        at = (0, 0, index, 0, 0)
        k, v = (jax.lax.dynamic_update_slice(*pair, at) for pair in ((self.k, k), (self.v, v)))
        return KVCache(constrain(k, *CACHE_AXES), constrain(v, *CACHE_AXES))


def init_cache(config: SpeechLMConfig, batch: int, capacity: int, dtype=None) -> dict[str, KVCache]:
    """Empty caches {"shared", "text", "audio"} for `batch` rows of `capacity` columns; dtype None is the config's."""
    layers = {"shared": config.num_shared_layers, "text": config.num_modality_layers}
    if config.audio_vocab_size:
        layers["audio"] = config.num_modality_layers
    heads = (config.num_key_value_heads, config.head_dim)
    dtype = jnp.dtype(dtype or config.dtype)
    caches = {}
    for name, depth in layers.items():
        shape = (depth, batch, capacity, *heads)
        caches[name] = KVCache(*(constrain(jnp.zeros(shape, dtype), *CACHE_AXES) for _ in "kv"))
    return caches

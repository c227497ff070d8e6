"""All parameters of the flow: code table, speaker projection, encoder, time embedding, velocity estimator."""

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_jax.nn.layers import Embed, Linear
from moss_jax.nn.tree import param_shapes
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.encoder import Encoder
from moss_jax.speech_decoder.flow.estimator import Estimator, TimeEmbedding


class FlowModel(nn.Module):
    """Used by its methods: `model.apply({"params": params}, ..., method="encode")`. `__call__` is for `init`."""

    config: FlowConfig

    def setup(self) -> None:
        config = self.config
        self.codes = Embed(config.vocab_size, config.encoder.hidden_size)
        self.speaker = Linear(config.mel_bins, (None, None))
        self.encoder = Encoder(config)
        self.mu = Linear(config.mel_bins, ("embed", None))
        self.time = TimeEmbedding(config)
        self.estimator = Estimator(config)

    def speaker_projection(self, embedding: jax.Array) -> jax.Array:
        """Speaker embedding float32 [B, E], of any length -> [B, M]. The zero vector is legal: no speaker."""
        norm = jnp.sqrt(jnp.square(embedding).sum(-1, keepdims=True))
        return self.speaker(embedding / jnp.maximum(norm, 1e-12))

    def embed(self, codes: jax.Array, count: jax.Array) -> jax.Array:
        """Codes int32 [B, T] -> float32 [B, T, D], zero from row `count` [B] on.

        The look-ahead sees zero rows after the end of an utterance, so that an item of a padded batch gets the result
        that it gets alone (the reference would embed the padding).
        """
        x = self.encoder.embed(self.codes(jnp.maximum(codes, 0)))
        return jnp.where((jnp.arange(codes.shape[1])[None] < count[:, None])[..., None], x, 0)

    def encode(
        self, x: jax.Array, valid: jax.Array, chunk: int | jax.Array | None = None, **stream: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        """`Encoder.__call__` with projected states: (mu float32 [B, T * frames_per_code, M], new tails and keys)."""
        states, new = self.encoder(x, valid, chunk, **stream)
        return self.mu(states), new

    def time_embedding(self, t: jax.Array) -> dict[str, jax.Array]:
        embedding: dict[str, jax.Array] = self.time(t)
        return embedding

    def velocity(self, *inputs: Any, **stream: Any) -> tuple[jax.Array, dict[str, Any]]:
        """`Estimator.__call__`."""
        return self.estimator(*inputs, **stream)

    def __call__(self) -> jax.Array:
        config = self.config
        valid = jnp.ones((1, config.chunk), bool)
        x = self.embed(jnp.zeros((1, config.chunk + config.lookahead), jnp.int32), jnp.full(1, config.chunk))
        mu, _ = self.encode(x, valid)
        speaker = self.speaker_projection(jnp.zeros((1, config.speaker_size)))
        valid = jnp.ones(mu.shape[:2], bool)
        velocity, _ = self.velocity(mu, mu, speaker, mu, self.time_embedding(jnp.zeros(1)), valid)
        return velocity


@cache
def flow_shapes(config: FlowConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat {path: ShapeDtypeStruct} of the parameters."""
    return param_shapes(FlowModel(config))

"""Parity of CAM++, the speaker embedding."""

import jax
import jax.numpy as jnp

from dev.parity.golden import Golden
from moss_jax.convert.tables.speaker import table
from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.speech_decoder.speaker import CAMPPlus, SpeakerConfig


def _speaker(golden: Golden) -> dict:
    given = golden.config
    config = SpeakerConfig(
        num_mel_bins=given["feat_dim"],
        embedding_size=given["embedding_size"],
        head_channels=given["m_channels"],
        head_blocks=tuple(given["head_blocks"]),
        init_channels=given["init_channels"],
        growth_rate=given["growth_rate"],
        bottleneck=given["bn_size"] * given["growth_rate"],
        context_reduction=given.get("reduction", 2),
        dense_layers=tuple(given["dense_layers"]),
        dense_dilations=tuple(given["dense_dilations"]),
        segment_frames=given.get("seg_len", 100),
    )
    model = CAMPPlus(config)
    tree = param_shapes(model, jnp.zeros((1, 8, config.num_mel_bins)))
    params = unflatten(golden.params(table(config), tree))
    return {"embedding": jax.jit(model.apply)({"params": params}, golden.need("feats"))}


COMPONENTS = {"codec.speaker": _speaker}

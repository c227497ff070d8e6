"""Parity of the speech tokenizer: the encoder with its quantiser, and waves to codes."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from dev.parity.golden import Golden, Mismatch
from dev.reference import padding
from moss_jax.convert.tables.speech_tokenizer import config_from_released, table
from moss_jax.nn.tree import unflatten
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encode import SpeechTokenizer
from moss_jax.speech_tokenizer.encoder import Encoder, encoder_shapes


def _build(golden: Golden, given: Mapping[str, Any]) -> tuple[SpeechTokenizerConfig, dict]:
    config = config_from_released(given, "config")
    weights = golden.params(table(config), encoder_shapes(config), golden.meta.get("weight_prefix", ""))
    return config, unflatten(weights)


def _encoder(golden: Golden) -> dict:
    config, params = _build(golden, golden.config)
    frames = golden.need("input_features").swapaxes(1, 2)
    apply = partial(Encoder(config).apply, {"params": params})
    mask = np.asarray(golden.inputs.get("attention_mask", np.ones(frames.shape[:2], np.int32)))
    token_mask = mask[:, ::2][:, :: config.pooling_kernel_size]
    keep = token_mask.astype(bool)
    pooled = apply(frames, method="pooled")
    codes = np.asarray(apply(pooled, method="quantize"))
    hidden = apply(codes, method="embed_codes")
    items = {f"tokens_{row}": codes[row][keep[row]] for row in range(len(codes))}
    return {
        "pooled": (pooled, golden.compared("pooled", keep)),
        "token_ids": (codes, golden.compared("token_ids", keep)),
        "token_mask": token_mask,
        "last_hidden_state": (hidden, keep[..., None]),
        **items,
    }


def _encode(golden: Golden) -> dict:
    config, params = _build(golden, golden.config["encoder"])
    tiled = np.tile(golden.need("wav_base"), golden.config["tile"])
    if len(tiled) < golden.config["long_samples"]:
        raise Mismatch(f"input/wav_base tiled has {len(tiled)} samples, long_samples is larger")
    waves = [tiled[: golden.config["long_samples"]]]
    if "wav_short" in golden.inputs:
        waves.append(golden.inputs["wav_short"])
    codes = padding.encode(SpeechTokenizer(config, params), waves)
    return {f"tokens_{row}": one for row, one in enumerate(codes)}


COMPONENTS = {"codec.vq_encoder": _encoder, "codec.encode": _encode}

"""Parity of the language model: the plain Qwen3, its layer-split initialisation, and the layer-split forward pass."""

from typing import Any

import jax
import numpy as np

from dev.parity.golden import Golden, Mismatch
from moss_jax.convert import layer_split
from moss_jax.convert.tables import qwen3
from moss_jax.convert.tables import speech_lm as released
from moss_jax.errors import MossError
from moss_jax.nn.tree import unflatten
from moss_jax.speech_lm import LayerSplitModel, SpeechLMConfig, init_cache, model_shapes


def read_config(golden: Golden) -> SpeechLMConfig:
    """The config in the golden's metadata, under the released keys."""
    try:
        return released.config_from_released(golden.config, "metadata 'config'")
    except MossError as error:
        raise Mismatch(str(error)) from error


def split_params(golden: Golden, config: SpeechLMConfig) -> dict:
    """The parameters of a layer-split golden, nested."""
    flat = golden.params(released.table(config), model_shapes(config), golden.meta.get("weight_prefix", ""))
    return unflatten(flat)


def mask_and_positions(golden: Golden, shape: tuple[int, int], prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """The padding mask (absent: all valid) and the positions (absent: counted along the mask)."""
    mask = golden.inputs.get(f"{prefix}attention_mask", np.ones(shape, np.int32))
    counted = np.where(mask == 0, 1, np.cumsum(mask, 1) - 1)
    return mask, golden.inputs.get(f"{prefix}position_ids", counted)


def split(golden: Golden) -> dict:
    """Component lm.split: the forward pass, and the first layer's keys and values from a prefill into a cache."""
    config = read_config(golden)
    model = LayerSplitModel(config)
    grid = golden.need("grid")
    mask, positions = mask_and_positions(golden, grid.shape[:2])

    def run(params):
        def call(method, *args, **keywords):
            return model.apply({"params": params}, *args, method=method, **keywords)

        out = {"embeds": call("embed", grid)}
        out["shared_hidden"] = call("block", "shared", out["embeds"], positions, mask)
        caches = init_cache(config, *grid.shape[:2])
        for name, before in {"shared": "embeds", "text": "shared_hidden", "audio": "shared_hidden"}.items():
            _, cache = call("block", name, out[before], positions, cache=caches[name], index=0, valid=mask != 0)
            out[f"cache/{name}/layer0_key"] = cache.k[0]
            out[f"cache/{name}/layer0_value"] = cache.v[0]
        out["text_logits"], out["audio_logits"] = call("__call__", grid, positions, mask)
        return out

    return _masked(jax.jit(run)(split_params(golden, config)), mask)


def plain(golden: Golden) -> dict:
    """Component lm.qwen3: the plain model on `input_ids`; the layer-split one initialised from it on `split_grid`."""
    config = read_config(golden)
    plain_config = layer_split.qwen3_config(config, golden.config.get("qwen3_vocab_size"))
    tree = model_shapes(plain_config)
    tied = bool(golden.config.get("tie_word_embeddings", False)) and "lm_head.weight" not in golden.weights
    if tied:
        del tree["text/head/kernel"]
    flat = golden.params(qwen3.table(plain_config), tree, golden.meta.get("weight_prefix", ""))
    results: dict[str, Any] = {}
    if "input_ids" in golden.inputs:
        ids = golden.need("input_ids")
        params = flat | ({"text/head/kernel": flat["text/embed/embedding"].T} if tied else {})
        mask, positions = mask_and_positions(golden, ids.shape)
        logits, _ = _forward(plain_config, params, np.stack([ids, np.zeros_like(ids)], -1), positions, mask)
        results |= _masked({"logits": logits}, mask)
    if golden.new or "split_grid" in golden.inputs:
        params = {}
        for path, value in flat.items():
            params |= layer_split.split_parameter(path, value, config, tied)
        params |= _new_tables(golden, config)
        grid = golden.need("split_grid")
        mask, positions = mask_and_positions(golden, grid.shape[:2], "split_")
        text, audio = _forward(config, params, grid, positions, mask)
        results |= _masked({"split_text_logits": text, "split_audio_logits": audio}, mask)
    return results


def _new_tables(golden: Golden, config: SpeechLMConfig) -> dict[str, np.ndarray]:
    tree = {path: leaf for path, leaf in model_shapes(config).items() if path in layer_split.AUDIO_TABLES}
    try:
        return released.table(config).to_ours(golden.new, tree, "new tensors")
    except MossError as error:
        raise Mismatch(str(error)) from error


def _forward(config, flat, grid, positions, segment_ids):
    model = LayerSplitModel(config)
    return jax.jit(model.apply)({"params": unflatten(flat)}, grid, positions, segment_ids)


def _masked(results: dict, mask: np.ndarray) -> dict:
    """Pairs each [B, T, ...] output with the mask of its valid rows."""
    return {name: (x, (mask != 0).reshape(*mask.shape, *[1] * (x.ndim - 2))) for name, x in results.items()}


COMPONENTS = {"lm.split": split, "lm.qwen3": plain}

"""Test fixtures: a tiny language model that switches modes often, and a byte-level text tokenizer with its ids."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.speech_lm import TINY, LayerSplitModel
from moss_jax.text.tokenizer import SPECIAL_STRINGS, TextTokenizer


def tokenizer_json(config) -> str:
    """One token per byte, no merges, and the special strings at the ids of the config. The library numbers added
    tokens after the vocabulary, so every id in between has a token too."""
    from tokenizers import pre_tokenizers

    bytes_and_fillers = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"unused{i}" for i in range(256, 1000))]
    vocab = {token: i for i, token in enumerate(bytes_and_fillers[: config.endoftext_id])}
    added = {i: f"<|extra{i}|>" for i in range(config.endoftext_id, config.modality_pad_id)}
    added |= {getattr(config, field): string for field, string in SPECIAL_STRINGS.items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "normalizer": None,
            "pre_tokenizer": level,
            "added_tokens": [
                {"id": i, "content": added[i], "special": added[i] != "<think>", **flags} for i in sorted(added)
            ],
            "post_processor": None,
            "decoder": level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": [],
            },
        }
    )


@pytest.fixture(scope="session")
def text_tokenizer():
    return TextTokenizer(tokenizer_json(TINY))


@pytest.fixture(scope="session")
def params():
    return random_params()


def random_params():
    """Random weights of TINY whose heads favour the ids that start speech, end speech and end a reply."""
    grid = jax.ShapeDtypeStruct((1, 1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    rng = np.random.default_rng(1)
    params = {}
    for path, leaf in param_shapes(LayerSplitModel(TINY), *grid).items():
        size = {"scale": 0.0, "embedding": 0.02}.get(path.rpartition("/")[2], 0.1)
        params[path] = rng.normal(path.endswith("scale"), size, leaf.shape).astype(np.float32)
    for branch, ids in {"text": [TINY.sosp_id, TINY.im_end_id, TINY.modality_pad_id], "audio": [TINY.eosp_id]}.items():
        params[f"{branch}/head/kernel"] *= 6
        params[f"{branch}/head/kernel"][:, ids] *= 1.5 if branch == "text" else 2
    return unflatten(jax.tree.map(jnp.asarray, params))

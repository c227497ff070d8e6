"""A tiny transformer that changes its mode often, and a byte-level text tokenizer that fits it."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from moss_jax.dialogue.text_tokenizer import SPECIAL_STRINGS, TextTokenizer
from moss_jax.transformer import TINY, LayerSplitModel


def tokenizer_json(config) -> str:
    """One token a byte, without merges, and the special strings at the ids of the config. The library numbers added
    tokens on from the vocabulary, so that every id in between has a token too."""
    from tokenizers import pre_tokenizers

    bytes_and_fillers = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"unused{i}" for i in range(256, 1000))]
    vocab = {token: i for i, token in enumerate(bytes_and_fillers[: config.endoftext_id])}
    added = {i: f"<|extra{i}|>" for i in range(config.endoftext_id, config.modality_pad_id)}
    added |= {getattr(config, field): string for field, string in SPECIAL_STRINGS.items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level,
        "added_tokens": [
            {"id": i, "content": added[i], "special": added[i] != "<think>", **flags} for i in sorted(added)
        ],
        "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": []},
    })  # fmt: skip


@pytest.fixture(scope="session")
def text_tokenizer():
    return TextTokenizer(tokenizer_json(TINY))


@pytest.fixture(scope="session")
def params():
    return random_params()


def random_params():
    """Random weights of TINY whose heads favour the ids that open speech, end speech and end a reply."""
    init = jax.jit(LayerSplitModel(TINY).init)
    grid = jnp.zeros((1, 1, 2), jnp.int32)
    params = nn.unbox(init(jax.random.key(1), grid, grid[..., 0]))["params"]
    scale = {"text": jnp.full(320, 30.0), "audio": jnp.full(96, 30.0)}
    scale["text"] = scale["text"].at[jnp.array([TINY.sosp_id, TINY.im_end_id, TINY.modality_pad_id])].multiply(1.5)
    scale["audio"] = scale["audio"].at[TINY.eosp_id].multiply(2)
    for branch, factors in scale.items():
        params[branch]["head"]["kernel"] = params[branch]["head"]["kernel"] * factors
    return params

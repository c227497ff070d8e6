"""A small text tokenizer of our own: byte-level, untrained, Qwen's special tokens at the ids that a config says."""

import json
from pathlib import Path

from moss_jax.transformer.config import TransformerConfig

# Qwen's added tokens, in the order of their ids; <|endoftext|> has the config's endoftext_id.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip
MERGES = ("e r", "Ġ a", "s t", "i n", "Ġ t", "h e", "a n", "o n", "u s", "s y", "Ġt he", "us er", "sy st")


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE, in the order of its ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]


def write_text_tokenizer(path: Path, config: TransformerConfig) -> None:
    """A byte-level `tokenizer.json`: 256 bytes, a few merges, and Qwen's 26 special tokens at the config's ids."""
    alphabet = byte_alphabet()
    merges = [merge for i, merge in enumerate(MERGES) if 256 + i < config.endoftext_id]
    vocab = {token: i for i, token in enumerate([*alphabet, *(merge.replace(" ", "") for merge in merges)])}
    special = {token: config.endoftext_id + i for i, token in enumerate(SPECIAL_TOKENS)}
    added = [
        {
            "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": token.startswith("<|") and not token.startswith(("<|fim", "<|repo", "<|file")),
        }
        for token, i in special.items()
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    description = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            # The special tokens stand here too: the library gives the others the next free id, not the one written.
            "vocab": vocab | special, "merges": [merge.split(" ") for merge in merges],
        },
    }  # fmt: skip
    path.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")

"""Small text tokenizers: byte-level BPE with given merges, followed by Qwen's special tokens."""

import json
from collections.abc import Iterable, Sequence

# Qwen's added tokens, in the order of their ids; <|endoftext|> has the config's endoftext_id, <think> its
# modality_pad_id.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


def byte_alphabet() -> list[str]:
    """The printable characters that stand for the 256 bytes in a byte-level BPE, in the order of their ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]


def learn_merges(texts: Iterable[str], count: int) -> list[str]:
    """Learns at most `count` BPE merges from texts; deterministic."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=256 + count, initial_alphabet=byte_alphabet(), show_progress=False)
    learner.train_from_iterator(texts, trainer)
    return [" ".join(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]


def byte_level(merges: Sequence[str], endoftext_id: int) -> str:
    """The content of a `tokenizer.json`: 256 bytes, as many of the merges as fit below `endoftext_id`, and Qwen's 26
    special tokens from that id on."""
    alphabet = byte_alphabet()
    merges = merges[: max(0, endoftext_id - 256)]
    vocab = {token: i for i, token in enumerate([*alphabet, *(merge.replace(" ", "") for merge in merges)])}
    special = {token: endoftext_id + i for i, token in enumerate(SPECIAL_TOKENS)}
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token.startswith("<|") and not token.startswith(("<|fim", "<|repo", "<|file")),
        }
        for token, i in special.items()
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": level,
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
            # The special tokens are in the vocabulary too: otherwise the library numbers them from the next free id.
            "vocab": vocab | special,
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    return json.dumps(description, ensure_ascii=False)

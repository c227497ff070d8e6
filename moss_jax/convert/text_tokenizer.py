"""Writes the text tokenizer of systems with random weights: byte-level, with a few fixed merges."""

from pathlib import Path

from moss_jax.speech_lm.config import SpeechLMConfig
from moss_jax.text.byte_level import SPECIAL_TOKENS, byte_level

__all__ = ["SPECIAL_TOKENS", "write_text_tokenizer"]
MERGES = ("e r", "Ġ a", "s t", "i n", "Ġ t", "h e", "a n", "o n", "u s", "s y", "Ġt he", "us er", "sy st")


def write_text_tokenizer(path: Path, config: SpeechLMConfig) -> None:
    """A byte-level `tokenizer.json`: 256 bytes, a few merges, and Qwen's 26 special tokens at the config's ids."""
    path.write_text(byte_level(MERGES, config.endoftext_id), encoding="utf-8")

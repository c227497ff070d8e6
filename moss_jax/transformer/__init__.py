"""The layer-split Qwen3 language model."""

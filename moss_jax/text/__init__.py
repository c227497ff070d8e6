"""Text of the language model: the tokenizer and the chat template."""

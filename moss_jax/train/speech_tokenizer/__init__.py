"""Training of the speech tokenizer: speech recognition through its codes."""

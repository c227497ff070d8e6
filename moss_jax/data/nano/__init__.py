"""Nano's domain: what can be asked and answered, who asks, what is kept for tests; its corpus and its test items."""

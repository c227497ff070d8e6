"""Codes -> speech: flow matching decoder, HiFT vocoder, speaker embedding."""

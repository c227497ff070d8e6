"""Waveforms and acoustic features. Knows no model."""

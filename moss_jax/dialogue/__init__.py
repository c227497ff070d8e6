"""Turns, grids, sampling, generation, voices: the whole pipeline."""

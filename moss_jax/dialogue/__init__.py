"""Turns, grids, sampling, generation, voices: the whole pipeline."""

import importlib

PUBLIC = {"Reply": "system", "System": "system", "load": "system", "Turn": "turns"}


def __getattr__(name: str):
    if name in PUBLIC:
        return getattr(importlib.import_module(f"moss_jax.dialogue.{PUBLIC[name]}"), name)
    raise AttributeError(f"module 'moss_jax.dialogue' has no attribute {name!r}")

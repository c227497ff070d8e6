"""Generation with the language model: settings, sampling, the rules of a reply, and the compiled loop."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jax.generate.loop import decode_chunk, prefill
    from moss_jax.generate.sampling import ChannelSettings, GenerationSettings, request_keys
    from moss_jax.generate.slots import GenerationState, new_state

# Imported on first use: `moss_jax.generate.settings` alone must not load jax.
_MODULES = {
    "ChannelSettings": "sampling",
    "GenerationSettings": "sampling",
    "GenerationState": "slots",
    "decode_chunk": "loop",
    "new_state": "slots",
    "prefill": "loop",
    "request_keys": "sampling",
}
__all__ = [
    "ChannelSettings",
    "GenerationSettings",
    "GenerationState",
    "decode_chunk",
    "new_state",
    "prefill",
    "request_keys",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'moss_jax.generate' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moss_jax.generate.{_MODULES[name]}"), name)

"""Conversations: turns, token grids, voices, and `System`, the whole pipeline from recordings to spoken replies."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jax.dialogue.conversation import Conversation, LanguageModel
    from moss_jax.dialogue.reply import Reply, ReplyStream
    from moss_jax.dialogue.system import System, load
    from moss_jax.dialogue.turns import Turn

# Imported on first use: turns and questions alone must not load the models.
_MODULES = {
    "Conversation": "conversation",
    "LanguageModel": "conversation",
    "Reply": "reply",
    "ReplyStream": "reply",
    "System": "system",
    "Turn": "turns",
    "load": "system",
}
__all__ = ["Conversation", "LanguageModel", "Reply", "ReplyStream", "System", "Turn", "load"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'moss_jax.dialogue' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moss_jax.dialogue.{_MODULES[name]}"), name)

"""Training: runs and their configs, the loop with checkpoints and metrics, and the tasks that it trains.

The names below are what configs and programs import; they are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jax.train.optimizer import OptimizerConfig
    from moss_jax.train.run import Guard, MeshSizes
    from moss_jax.train.run_file import load_run
    from moss_jax.train.speech_decoder.discriminators import DiscriminatorConfig
    from moss_jax.train.speech_decoder.flow import FlowObjective
    from moss_jax.train.speech_decoder.run import FlowRun, VocoderRun
    from moss_jax.train.speech_decoder.vocoder import VocoderObjective
    from moss_jax.train.speech_lm.run import Run
    from moss_jax.train.speech_tokenizer.run import Objective, SpeechTokenizerRun

__all__ = [
    "DiscriminatorConfig",
    "FlowObjective",
    "FlowRun",
    "Guard",
    "MeshSizes",
    "Objective",
    "OptimizerConfig",
    "Run",
    "SpeechTokenizerRun",
    "VocoderObjective",
    "VocoderRun",
    "load_run",
]

_MODULES = {
    "DiscriminatorConfig": "speech_decoder.discriminators",
    "FlowObjective": "speech_decoder.flow",
    "FlowRun": "speech_decoder.run",
    "Guard": "run",
    "MeshSizes": "run",
    "Objective": "speech_tokenizer.run",
    "OptimizerConfig": "optimizer",
    "Run": "speech_lm.run",
    "SpeechTokenizerRun": "speech_tokenizer.run",
    "VocoderObjective": "speech_decoder.vocoder",
    "VocoderRun": "speech_decoder.run",
    "load_run": "run_file",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

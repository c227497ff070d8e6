"""The kinds of runs: which class describes a run of a kind, and which function prepares its training.

A new kind is one line here, a run (a frozen dataclass that extends `moss_jax.train.run.BaseRun`) and a task (see
`moss_jax.train.task`). Both are imported when they are needed: neither imports the other or this file.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from moss_jax.errors import MossError
from moss_jax.progress import Say
from moss_jax.train.run import BaseRun
from moss_jax.train.task import Flat, Task


@dataclass(frozen=True)
class Kind:
    """Where the parts of one kind of run are, each as "module:name"."""

    run: str  # a subclass of BaseRun
    prepare: str  # (run, mesh, say) -> (Task, initial parameters)


DEFAULT_KIND = "language_model"  # of a run.json without a kind
KINDS = {
    DEFAULT_KIND: Kind("moss_jax.train.speech_lm.run:Run", "moss_jax.train.speech_lm.task:prepare"),
    "speech_tokenizer": Kind(
        "moss_jax.train.speech_tokenizer.run:SpeechTokenizerRun", "moss_jax.train.speech_tokenizer.task:prepare"
    ),
    "flow": Kind("moss_jax.train.speech_decoder.run:FlowRun", "moss_jax.train.speech_decoder.task:prepare_flow"),
    "vocoder": Kind(
        "moss_jax.train.speech_decoder.run:VocoderRun", "moss_jax.train.speech_decoder.task:prepare_vocoder"
    ),
}


def run_class(kind: str) -> type[BaseRun]:
    """The class of the runs of a kind. Raises MossError when there is no such kind."""
    if kind not in KINDS:
        raise MossError(f"run: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    return _load(KINDS[kind].run)


def prepare(run: BaseRun, mesh: Mesh, say: Say) -> tuple[Task, Flat]:
    """Loads what a run trains.

    Returns:
        (the task, the flat parameters {path: array} that `Task.new_state` takes, on the mesh: all that are not frozen)

    Raises:
        MossError: what the run starts from is missing, damaged, or does not fit, or a batch does not divide over the
            mesh.
    """
    return _load(KINDS[run.kind].prepare)(run, mesh, say)


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)

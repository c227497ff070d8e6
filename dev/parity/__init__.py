"""`moss-jax parity`: our components against numeric references from the PyTorch implementation.

A component is a function `(Golden) -> {output name: array}`. In place of an array it may return `(array, mask)` with a
boolean mask that broadcasts to the array and is True where values are compared. Each module of this package has a table
`COMPONENTS` from component names, as in the metadata of golden files, to functions.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dev.parity.golden import Golden, Mismatch, read_golden
from moss_jax.errors import MossError

__all__ = ["Check", "Golden", "Mismatch", "check_golden", "read_golden"]

MODULES = {
    "codec.decode": "decoder",
    "codec.decode_stream": "decoder",
    "codec.vocoder": "vocoder",
    "codec.estimator": "flow",
    "codec.flow": "flow",
    "codec.flow_encoder": "flow",
    "codec.flow_noise": "flow",
    "codec.encode": "speech_tokenizer",
    "codec.fbank": "audio",
    "codec.logmel": "audio",
    "codec.prompt_mel": "audio",
    "codec.resample": "audio",
    "codec.speaker": "speaker",
    "codec.vq_encoder": "speech_tokenizer",
    "lm.fsm": "dialogue",
    "lm.generate": "dialogue",
    "lm.grid": "dialogue",
    "lm.qwen3": "transformer",
    "lm.sampler": "dialogue",
    "lm.split": "transformer",
    "lm.train_step": "train",
}  # component -> module of this package


@dataclass(frozen=True)
class Check:
    """The comparison of one output: `worst` is the largest |ours - golden|, `excess` the largest ratio of a difference
    to its tolerance (at most 1 passes)."""

    output: str
    passed: bool
    compared: int = 0
    worst: float = 0.0
    excess: float = 0.0
    note: str = ""


def component(name: str) -> Callable[[Golden], dict]:
    """The function of a component; raises Mismatch for an unknown name."""
    if name not in MODULES:
        raise Mismatch(f"unknown component {name!r}; known: {', '.join(sorted(MODULES))}")
    return importlib.import_module(f"dev.parity.{MODULES[name]}").COMPONENTS[name]


def check_golden(golden: Golden) -> Iterator[Check]:
    """Runs the golden's component and yields one Check for each output in `final`."""
    try:
        if not golden.final:
            raise Mismatch("metadata 'final' names no output to compare")
        results = component(golden.component)(golden)
    except (Mismatch, MossError) as error:
        yield Check("-", False, note=str(error))
        return
    except Exception as error:  # only this file fails; the following ones are still compared
        yield Check("-", False, note=f"{golden.component} failed: {type(error).__name__}: {error}".partition("\n")[0])
        return
    for name, tolerance in golden.final.items():
        yield compare(name, golden, results, tolerance)


def compare(name: str, golden: Golden, results: dict, tolerance: tuple[float, float]) -> Check:
    stored = name.partition("@")[0]
    if stored not in golden.outputs:
        return Check(name, False, note=f"output/{stored} is not in the file")
    if name not in results:
        return Check(name, False, note="the component does not compute this output")
    expected = golden.outputs[stored]
    result = results[name]
    ours, mask = result if isinstance(result, tuple) else (result, True)
    ours = np.asarray(ours)
    if ours.shape != expected.shape:
        return Check(name, False, note=f"shape {list(ours.shape)}, expected {list(expected.shape)}")
    mask = np.broadcast_to(mask, expected.shape)
    ours = ours[mask].astype(np.float64)
    expected = expected[mask].astype(np.float64)
    if ours.size == 0:
        return Check(name, False, note="nothing to compare")
    infinite = ~np.isfinite(expected) | ~np.isfinite(ours)  # equal infinities match, NaN never matches
    difference = np.abs(np.where(infinite, 0, ours) - np.where(infinite, 0, expected))
    difference = np.where(infinite & (ours != expected), np.inf, difference)
    atol, rtol = tolerance
    allowed = atol + rtol * np.where(infinite, 0, np.abs(expected))
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(difference == 0, 0.0, difference / allowed)
    return Check(name, bool(excess.max() <= 1), ours.size, float(difference.max()), float(excess.max()))

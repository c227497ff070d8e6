"""What a run tells: a line of JSON a step, a line for people now and then, TensorBoard and Weights & Biases when asked.

metrics.jsonl       {"step": 120, "loss": 5.1, ...}   update 120: its loss is that before it
evaluations.jsonl   {"step": 120, "loss": 5.3, ...}   held-out data with the parameters after update 120
"""

import contextlib
import json
import math
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_jax.checkpoint import atomic_file
from moss_jax.documents import parse_object
from moss_jax.errors import MossError
from moss_jax.progress import duration

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
GIB = 2**30


class MetricsFile:
    """One JSON object a line, no step twice.

    Args:
        path: of the file, which may be there.
        step: the run goes on after this update: entries of later ones, and half a line, are taken out.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        with self._readable_errors():
            kept = []
            if path.exists():
                content = path.read_bytes()
                kept = [(line, entry) for line, entry in _entries(content) if entry["step"] <= step]
                text = b"".join(line for line, _ in kept)
                if text != content:
                    with atomic_file(path) as part:
                        part.write_bytes(text)
            self._file = path.open("a", encoding="utf-8")
        self._last = kept[-1][1]["step"] if kept else None

    def has(self, step: int) -> bool:
        """Whether the last entry is of this step."""
        return self._last == step

    def write(self, entry: Mapping[str, Any]) -> None:
        with self._readable_errors():
            self._file.write(json.dumps({key: _plain(value) for key, value in entry.items()}) + "\n")
            self._file.flush()
        self._last = entry["step"]

    def sync(self) -> None:
        """Returns when what was written is on the disk."""
        with self._readable_errors():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._readable_errors():
            self._file.close()

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise MossError(f"{self.path}: cannot be written ({reason}); free some space, then run it again") from error


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl or evaluations.jsonl. Raises MossError when there is no such file."""
    try:
        return [entry for _, entry in _entries(path.read_bytes())]
    except OSError as error:
        raise MossError(f"{path}: cannot be read ({error.strerror}), expected the metrics of a run") from error


class Board:
    """TensorBoard and Weights & Biases, as far as they were asked for."""

    def __init__(self, folder: Path, tensorboard: bool, wandb: str | None, name: str, settings: Mapping[str, Any]):
        self._writer = self._wandb = None
        if tensorboard:
            module = _optional("tensorboardX", "tensorboard=true")
            self._writer = module.SummaryWriter(str(folder / "tensorboard"))
        if wandb is not None:
            module = _optional("wandb", f"wandb={wandb}")
            self._wandb = module.init(project=wandb, name=name, id=name, resume="allow", config=dict(settings))

    def write(self, kind: str, entry: Mapping[str, Any]) -> None:
        step = entry["step"]
        numbers = {f"{kind}/{key}": value for key, value in _numbers(entry) if key != "step"}
        if self._writer is not None:
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def by_source(metrics: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """{source: {"text_loss", "text_count", "audio_loss", "audio_count"}} from the step's sums, where there are any."""
    table: dict[str, dict[str, float]] = {name: {} for name in names}
    for channel in ("text", "audio"):
        if f"source_{channel}_sum" not in metrics:
            continue
        pairs = zip(metrics[f"source_{channel}_sum"], metrics[f"source_{channel}_count"], strict=True)
        for name, (total, count) in zip(names, pairs, strict=True):
            if count > 0:
                table[name] |= {f"{channel}_loss": float(total) / float(count), f"{channel}_count": float(count)}
    return {name: losses for name, losses in table.items() if losses}


def memory_gib() -> float:
    """The most memory in use so far, GiB: of this process's fullest device, or of the process where devices have none
    of their own."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(entry.get("peak_bytes_in_use", 0) for entry in statistics)
    if not peak:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB


def losses(entry: Mapping[str, Any], shown: Sequence[str] = ("text_loss", "audio_loss")) -> str:
    """What a person reads of the losses: "loss 2.0000 (text 1.5000, audio 0.5000)"."""
    parts = [f"{name.removesuffix('_loss')} {entry[name]:.4f}" for name in shown if name in entry]
    return f"loss {entry['loss']:.4f}" + (f" ({', '.join(parts)})" if parts else "")


def measured(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry without the losses of targets that the batch does not have (a count of 0): they say nothing."""
    missing = {
        f"{name.removesuffix('_count')}_loss" for name, value in entry.items() if name.endswith("_count") and value == 0
    }
    return {name: value for name, value in entry.items() if name not in missing}


class IntervalMetrics:
    """What the next progress line reports: means over the steps since the last line.

    The loss of a target is a mean over the targets of these steps, and one that no step had is left out. Steps whose
    update was skipped count for the speed only.

    Args:
        shown: the metrics that stand beside the loss, as far as there are any.
        weights: {metric: weight} of the losses that the loss is the weighted sum of; empty: the mean loss of the steps
            is shown.
        unit: of what the throughput counts.
        peak: FLOP/s of all devices; None where it is not known.
    """

    def __init__(self, shown: Sequence[str], weights: Mapping[str, float], unit: str, peak: float | None):
        self._shown = shown
        self._weights = weights
        self._unit = unit
        self._peak = peak
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._totals = {"seconds": 0.0, "tokens": 0.0, "waited": 0.0, "flops": 0.0}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, entry: Mapping[str, Any], flops: float) -> None:
        """Takes a step in.

        Args:
            entry: its line of metrics.jsonl.
            flops: FLOP of the model.
        """
        self._steps += 1
        seconds = entry["step_seconds"]
        new = {"seconds": seconds, "waited": entry["data_seconds"], "flops": flops}
        for name, value in (new | {"tokens": entry["tokens_per_second"] * seconds}).items():
            self._totals[name] += value
        if entry["skipped"]:
            return
        for name in ("loss", "grad_norm", *self._shown):
            if name in entry:
                count = entry.get(f"{name.removesuffix('_loss')}_count", 1.0)
                self._sums[name] = self._sums.get(name, 0.0) + count * entry[name]
                self._counts[name] = self._counts.get(name, 0.0) + count

    def line(self, entry: Mapping[str, Any], steps: int) -> str:
        """The line of the step that was added last, of `steps` in all; the next line begins anew."""
        means = {name: self._sums[name] / count for name, count in self._counts.items() if count > 0}
        weighed = [self._weights[name] * means[name] for name in self._weights if name in means]
        if weighed:
            means["loss"] = sum(weighed)
        step_seconds = self._totals["seconds"] / self._steps
        rate = self._totals["tokens"] / self._totals["seconds"]
        words = [f"step {entry['step']}/{steps}"]
        if means:
            words += [losses(means, self._shown), f"grad {means['grad_norm']:.3g}"]
        else:
            words.append("every update was skipped")
        words += [
            f"lr {entry['learning_rate']:.2e}",
            f"{_short(rate)} {self._unit}/s",
            f"{duration(step_seconds)} a step",
            f"data {100 * self._totals['waited'] / self._totals['seconds']:.1f}%",
        ]
        if self._peak:
            words.append(f"MFU {100 * self._totals['flops'] / self._totals['seconds'] / self._peak:.1f}%")
        self._clear()
        return "  ".join([*words, f"{duration((steps - entry['step']) * step_seconds)} left"])


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _entries(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, entry) of every whole line."""
    for line in content.split(b"\n")[:-1]:
        try:
            entry = parse_object(line)
        except MossError:
            continue
        step = entry.get("step")
        if type(step) is int and 0 <= step < 2**63:
            yield line + b"\n", entry


def _numbers(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as strings, which float() reads."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _optional(module: str, asked: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MossError(f"{asked}: needs the package {module}, pip install {module}") from error

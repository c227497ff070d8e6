"""What a run records: a JSON line per step, progress lines for people, TensorBoard and Weights & Biases on request.

metrics.jsonl       {"step": 120, "loss": 5.1, ...}   update 120, with the loss before the update
evaluations.jsonl   {"step": 120, "loss": 5.3, ...}   held-out data with the parameters after update 120
"""

import contextlib
import importlib
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

from moss_jax.documents import parse_object
from moss_jax.errors import MossError
from moss_jax.files import atomic_file
from moss_jax.progress import duration
from moss_jax.train.run_folder import EVALUATIONS_FILE, METRICS_FILE

GIB = 2**30


class MetricsFile:
    """A file with one JSON object per line and at most one per step.

    Args:
        path: of the file, which may exist.
        step: the run resumes after this update: entries of later ones, and an incomplete line, are removed.

    Raises:
        MossError: the file cannot be written; also by the methods.
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
        self._last_step = kept[-1][1]["step"] if kept else None

    def has(self, step: int) -> bool:
        """Whether the last entry is of this step."""
        return self._last_step == step

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends an entry, which has a "step"."""
        with self._readable_errors():
            self._file.write(json.dumps({key: _json_value(value) for key, value in entry.items()}) + "\n")
            self._file.flush()
        self._last_step = entry["step"]

    def sync(self) -> None:
        """Returns when the entries are on the disk."""
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
    """TensorBoard and Weights & Biases, each if requested.

    Args:
        folder: of the run.
        wandb: the project on Weights & Biases; None: not used.
        name: of the run.
        settings: of the run, shown on Weights & Biases.

    Raises:
        MossError: the package is not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool, wandb: str | None, name: str, settings: Mapping[str, Any]):
        self._writer: Any = None
        self._wandb: Any = None
        if tensorboard:
            module = _optional("tensorboardX", "tensorboard=true")
            self._writer = module.SummaryWriter(str(folder / "tensorboard"))
        if wandb is not None:
            module = _optional("wandb", f"wandb={wandb}")
            self._wandb = module.init(project=wandb, name=name, id=name, resume="allow", config=dict(settings))

    def write(self, group: str, entry: Mapping[str, Any]) -> None:
        """Writes the numbers of an entry as "group/name"."""
        step = entry["step"]
        numbers = {f"{group}/{key}": value for key, value in _numbers(entry) if key != "step"}
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


class RunLog:
    """Everything that a run records by step: metrics.jsonl, evaluations.jsonl and the board.

    Args:
        folder: of the run.
        step: the run resumes after this update.
        board: receives the same numbers; it is closed by its owner.
    """

    def __init__(self, folder: Path, step: int, board: Board):
        self._metrics = MetricsFile(folder / METRICS_FILE, step)
        self._evaluations = MetricsFile(folder / EVALUATIONS_FILE, step)
        self._board = board

    def write_step(self, entry: Mapping[str, Any]) -> None:
        self._metrics.write(entry)
        self._board.write("train", entry)

    def write_evaluation(self, entry: Mapping[str, Any], seconds: float) -> None:
        """Writes an evaluation that took some seconds."""
        self._evaluations.write({**entry, "seconds": seconds})
        self._board.write("held_out", entry)

    def has_evaluation(self, step: int) -> bool:
        """Whether the last evaluation is of this step."""
        return self._evaluations.has(step)

    def sync(self) -> None:
        """Returns when the metrics are on the disk."""
        self._metrics.sync()

    def close(self) -> None:
        self._metrics.close()
        self._evaluations.close()


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
    """The peak memory use in GiB: of this process's fullest device, or of the process where devices have no memory of
    their own."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(entry.get("peak_bytes_in_use", 0) for entry in statistics)
    if not peak:
        # Bytes on macOS, KiB elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB


def losses(entry: Mapping[str, Any], reported: Sequence[str] = ("text_loss", "audio_loss")) -> str:
    """The losses in a progress line: "loss 2.0000 (text 1.5000, audio 0.5000)".

    Args:
        reported: names of further metrics, as far as the entry has them.
    """
    parts = [f"{name.removesuffix('_loss')} {entry[name]:.4f}" for name in reported if name in entry]
    return f"loss {entry['loss']:.4f}" + (f" ({', '.join(parts)})" if parts else "")


def measured(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry without the losses of targets that are not in the batch (a count of 0), which have no meaning."""
    missing = {
        f"{name.removesuffix('_count')}_loss" for name, value in entry.items() if name.endswith("_count") and value == 0
    }
    return {name: value for name, value in entry.items() if name not in missing}


class IntervalMetrics:
    """The means that the next progress line reports, over the steps since the last line.

    The loss of a target is a mean over the targets of these steps; a loss without targets is left out. Steps whose
    update was skipped count for the speed only.

    Args:
        reported: names of the metrics that follow the loss, as far as there are any.
        weights: {metric: weight} where the loss is a weighted sum of metrics; empty: the mean of the steps' losses is
            reported.
        unit: of the throughput.
        peak: FLOP/s of all devices; None where it is not known.
    """

    def __init__(self, reported: Sequence[str], weights: Mapping[str, float], unit: str, peak: float | None):
        self._reported = reported
        self._weights = weights
        self._unit = unit
        self._peak = peak
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._data_seconds = 0.0
        self._tokens = 0.0
        self._flops = 0.0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, entry: Mapping[str, Any], flops: float) -> None:
        """Adds a step.

        Args:
            entry: of the step in metrics.jsonl.
            flops: FLOP of the step.
        """
        seconds = entry["step_seconds"]
        self._steps += 1
        self._seconds += seconds
        self._data_seconds += entry["data_seconds"]
        self._tokens += entry["tokens_per_second"] * seconds
        self._flops += flops
        if entry["skipped"]:
            return
        for name in ("loss", "grad_norm", *self._reported):
            if name in entry:
                count = entry.get(f"{name.removesuffix('_loss')}_count", 1.0)
                self._sums[name] = self._sums.get(name, 0.0) + count * entry[name]
                self._counts[name] = self._counts.get(name, 0.0) + count

    def line(self, entry: Mapping[str, Any], steps: int) -> str:
        """The progress line after the last added step, of `steps` in all; starts a new interval."""
        means = {name: self._sums[name] / count for name, count in self._counts.items() if count > 0}
        weighted = [weight * means[name] for name, weight in self._weights.items() if name in means]
        if weighted:
            means["loss"] = sum(weighted)
        step_seconds = self._seconds / self._steps
        words = [f"step {entry['step']}/{steps}"]
        if means:
            words += [losses(means, self._reported), f"grad {means['grad_norm']:.3g}"]
        else:
            words.append("every update was skipped")
        words += [
            f"lr {entry['learning_rate']:.2e}",
            f"{_short(self._tokens / self._seconds)} {self._unit}/s",
            f"{duration(step_seconds)} per step",
            f"data {100 * self._data_seconds / self._seconds:.1f}%",
        ]
        if self._peak:
            words.append(f"MFU {100 * self._flops / self._seconds / self._peak:.1f}%")
        self._clear()
        return "  ".join([*words, f"{duration((steps - entry['step']) * step_seconds)} left"])


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _entries(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, entry) of every complete line."""
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


def _json_value(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings, which float() reads."""
    if isinstance(value, Mapping):
        return {key: _json_value(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _optional(module: str, setting: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MossError(f"{setting}: needs the package {module}, pip install {module}") from error

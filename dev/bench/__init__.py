"""`moss-jax bench`: timings against a named peer in the same process on the same machine.

Each part is a module with `run(options) -> Iterator[Row]`. Our code and the peer run alternately, so that a change of
the speed of the machine affects both.
"""

import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = {
    "audio": "reading and resampling 1 s of audio at many sample rates, with peak memory, against soxr",
    "data": "packed batches from shards, tokens per second and core (no peer)",
    "lm": "the language model: prefill and decode steps, against transformers' Qwen3",
    "speech_tokenizer": "speech -> codes: the Whisper-VQ encoder on a 30 s clip, against PyTorch",
    "flow": "codes -> mel: offline and a chunk of the stream, against the reference classes (--reference)",
    "train": "a training step of stage 1 and of stage 2, against transformers' layers and torch's AdamW",
    "vocoder": "mel -> wave, and offline decode, against the reference classes (--reference)",
}


@dataclass(frozen=True)
class Options:
    """Options of a benchmark. `size` names a model size; `reference` is a checkout of the reference sources."""

    size: str = "full"
    repeats: int = 5
    reference: Path | None = None
    peer: bool = True


@dataclass
class Row:
    """One measurement: seconds of each run. `peer` is empty if no peer ran."""

    name: str
    ours: list[float]
    peer: list[float] = field(default_factory=list)
    peer_name: str = ""
    note: str = ""

    def cells(self) -> list[str]:
        ratio = ""
        if self.peer:
            ratios = sorted(p / o for o, p in zip(self.ours, self.peer, strict=False))
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        return [self.name, _seconds(self.ours), _seconds(self.peer), ratio, self.peer_name, self.note]


def compare(
    name: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any] | None = None,
    *,
    repeats: int = 5,
    peer_name: str = "",
    note: str = "",
) -> Row:
    """Times `ours()` and `peer()` alternately after one warm-up each, including the computation of their results."""
    import jax

    row = Row(name, [], [], peer_name if peer else "", note)
    jax.block_until_ready(ours())
    if peer:
        peer()
    for _ in range(repeats):
        row.ours.append(seconds_of(ours))
        if peer:
            row.peer.append(seconds_of(peer))
    return row


def seconds_of(function: Callable[[], Any]) -> float:
    """Seconds of one call, until its result is computed."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def run(part: str, options: Options) -> Iterator[Row]:
    """The rows of one part of PARTS."""
    yield from importlib.import_module(f"dev.bench.{part}").run(options)


def machine() -> str:
    """The hardware and versions in one line, for the head of a table."""
    import jax

    device = jax.devices()[0]
    versions = [f"Python {platform.python_version()}", f"jax {jax.__version__}"]
    try:
        import torch

        versions.append(f"torch {torch.__version__}")
    except ImportError:
        pass
    kind = _processor() if device.platform == "cpu" else device.device_kind
    return f"{len(jax.devices())} x {device.platform} ({kind}), {os.cpu_count()} cores; {', '.join(versions)}"


def table(rows: list[Row]) -> str:
    """A Markdown table: median seconds (minimum-maximum) and the ratio peer / ours, above 1 if ours is faster."""
    head = ["what", "ours, s", "peer, s", "peer / ours", "peer", "note"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _seconds(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

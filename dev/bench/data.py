"""Packed batches from shards: reading, packing and stacking rows of speech and text, in tokens per second and core.

Shards of random ids are written to a temporary folder first. Lengths are log-normal with a median of 300 rows for text
and 20 s for speech. "Per core" means per second of processor time, which includes threads that read ahead.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dev.bench import Options, Row
from moss_jax.data import Example, Mixture, open_batches, write_examples
from moss_jax.data.batches import StepBatches
from moss_jax.data.formats import speech, text
from moss_jax.data.pack import plan_packing
from moss_jax.errors import MossError
from moss_jax.speech_lm import MOSS_SPEECH_8B


@dataclass(frozen=True)
class Size:
    context: int  # T, rows of the grid in a packed row
    rows: int  # packed rows in a batch
    documents: int  # in each of the two sources
    planned: int  # documents of the packing plan that is timed


SIZES = {
    "full": Size(14336, 8, 20000, 1_000_000),
    "mid": Size(4096, 8, 4000, 100_000),
    "tiny": Size(512, 4, 200, 10_000),
}
STEPS = 20  # batches in a run


def run(options: Options) -> Iterator[Row]:
    """Rows for batches by this process, by two worker processes, and for the packing plan of an epoch."""
    if options.size not in SIZES:
        raise MossError(f"bench data: unknown size {options.size!r}, expected one of {', '.join(SIZES)}")
    size = SIZES[options.size]
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), size)
        mixture = Mixture((("speech", f"{folder}/speech", 3.0), ("text", f"{folder}/text", 1.0)))
        for workers in (0, 2):
            batches = open_batches(mixture, MOSS_SPEECH_8B, context=size.context, batch_size=size.rows, workers=workers)
            yield _time(batches, size, options.repeats, workers)
    lengths = _lengths(np.random.default_rng(0), size.planned, 300)
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        plan = plan_packing(lengths, size.context, np.random.default_rng(0))
        seconds.append(time.perf_counter() - start)
    filled = lengths.sum() / (len(plan) * size.context)
    yield Row(f"packing plan of {size.planned} documents", seconds, note=f"{filled:.2%} of the rows filled")


def _time(batches: StepBatches, size: Size, repeats: int, workers: int) -> Row:
    next(batches)  # opens files, makes the first plan, starts the workers
    if not workers:
        batches.skip_to(1)  # discards what was read ahead, so that reading it is measured
    wall = []
    tokens = 0
    spent = time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(STEPS):
            tokens += int((next(batches)["segment_ids"] > 0).sum())
        wall.append(time.perf_counter() - start)
    spent = time.process_time() - spent
    batches.close()
    note = f"{tokens / sum(wall):,.0f} packed tokens per second"
    if not workers:
        note += f", {tokens / spent:,.0f} per second and core"
    return Row(f"{STEPS} batches of {size.rows} x {size.context}, {workers or 'no'} worker processes", wall, note=note)


def _write(folder: Path, size: Size) -> None:
    random = np.random.default_rng(0)
    config = MOSS_SPEECH_8B
    for name, make, limit, median in (
        ("speech", speech, config.eosp_id, 250),
        ("text", text, config.endoftext_id, 300),
    ):
        examples = (
            Example(*make(random.integers(0, limit, length, np.int32), config))
            for length in _lengths(random, size.documents, median)
        )
        write_examples(folder / name, examples, config, kind=name)


def _lengths(random: np.random.Generator, count: int, median: float) -> np.ndarray:
    return np.maximum(2, random.lognormal(np.log(median), 0.8, count)).astype(np.int64)

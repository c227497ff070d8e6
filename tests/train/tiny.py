"""A tiny run for tests: random documents and a config file."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from moss_jax.data import Example, write_examples
from moss_jax.speech_lm.config import TINY
from tests import flags

ROOT = Path(__file__).resolve().parents[2]
MODEL = dataclasses.replace(
    TINY, num_shared_layers=2, num_modality_layers=1, hidden_size=32, intermediate_size=64, num_key_value_heads=4
)

CONFIG = """
from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.stages import STAGE_1, STAGE_2
from tests.train.tiny import MODEL

RUN = Run(
    name="tiny", folder={folder!r}, init="random", model=MODEL, stage=STAGE_2,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=3, total_steps=60),
    data=Mixture((("spoken", {data!r} + "/spoken", 2.0), ("written", {data!r} + "/written", 1.0)), seed=3),
    held_out=Mixture((("spoken", {data!r} + "/spoken", 1.0),), seed=4),
    context=32, batch_size=8, steps=12, save_every=4, evaluate_every=4, evaluate_batches=1, log_every=4,
    dtype="float32", frozen_dtype=None, remat="none",
)
"""


def documents(seed: int, spoken: bool, count: int = 60):
    """Random documents of text; in spoken ones two thirds of the rows are codes."""
    random = np.random.default_rng(seed)
    for index in range(count):
        length = int(random.integers(5, 40))
        grid = np.stack([random.integers(0, 200, length), np.full(length, MODEL.audio_pad_id)], 1).astype(np.int32)
        weights = np.zeros((length, 2), np.float32)
        weights[1:, 0] = 1
        if spoken:
            rows = slice(length // 3, None)
            grid[rows, 0] = MODEL.modality_pad_id
            grid[rows, 1] = random.integers(0, MODEL.eosp_id, length - length // 3)
            weights[rows] = 0, 1
            weights[0] = 0
        yield Example(grid, weights, f"document {index}")


def write_data(folder: Path) -> Path:
    for seed, name in enumerate(("spoken", "written")):
        write_examples(folder / name, documents(seed, name == "spoken"), MODEL)
    return folder


def write_config(path: Path, data: Path, folder: Path) -> Path:
    path.write_text(CONFIG.format(data=str(data), folder=str(folder)))
    return path


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """The environment of a process with `devices` CPU devices."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags.devices(devices), **more}


def command(config: Path, *settings: str, flags: tuple[str, ...] = ()) -> list[str]:
    sets = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "moss_jax", "train", "--config", str(config), *flags, *sets]


def run(config: Path, *settings: str, devices: int = 1, **keywords) -> subprocess.CompletedProcess:
    """`moss-jax train` in a separate process."""
    return subprocess.run(
        command(config, *settings), env=environment(devices), capture_output=True, text=True, cwd=ROOT, **keywords
    )

"""Nano's stage 2: all parameters are trained, on speech and some text.

moss-jax train --config moss_jax/recipes/nano/configs/stage2.py

About 11 minutes on two cores.
"""

import dataclasses
import runpy
from pathlib import Path

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig
from moss_jax.train.speech_lm.stages import STAGE_2

BEFORE = runpy.run_path(str(Path(__file__).with_name("stage1.py")))["RUN"]
STEPS = 700
RUN = dataclasses.replace(
    BEFORE,
    name="nano-stage2",
    folder="nano/runs/stage2",
    init="nano/runs/stage1",
    split=None,
    stage=STAGE_2,
    optimizer=OptimizerConfig(
        method="muon",
        learning_rate=2.5e-3,
        final_learning_rate=3e-4,
        warmup_steps=50,
        total_steps=STEPS,
        weight_decay=0.05,
    ),
    data=Mixture((*BEFORE.data.sources, ("text", "nano/data/text", 1.0))),
    steps=STEPS,
)

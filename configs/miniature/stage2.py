"""Stage 2: all of the model learns, from speech and some text.

moss-jax train --config configs/miniature/stage2.py
"""

import dataclasses
import runpy
from pathlib import Path

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig
from moss_jax.train.speech_lm.stages import STAGE_2

BEFORE = runpy.run_path(str(Path(__file__).with_name("stage1.py")))["RUN"]
RUN = dataclasses.replace(
    BEFORE,
    name="miniature-stage2",
    folder="miniature/runs/stage2",
    init="miniature/runs/stage1",
    split=None,
    stage=STAGE_2,
    optimizer=OptimizerConfig(learning_rate=5e-4, final_learning_rate=5e-5, warmup_steps=10, total_steps=BEFORE.steps),
    data=Mixture((*BEFORE.data.sources, ("text", "miniature/data/text", 1.0))),
)

"""Stage 2: all parameters train, on speech and some text.

  moss-jax train --config configs/miniature/stage2.py

Expect both losses to decrease further. The learning rate is a quarter of that of stage 1.
"""

from dataclasses import replace
from pathlib import Path

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, load_run
from moss_jax.train.speech_lm.stages import STAGE_2

STAGE1_RUN = load_run(Path(__file__).with_name("stage1.py"))

RUN = replace(
    STAGE1_RUN,
    name="miniature-stage2",
    folder="miniature/runs/stage2",
    init="miniature/runs/stage1",
    split=None,
    stage=STAGE_2,
    optimizer=OptimizerConfig(
        learning_rate=5e-4, final_learning_rate=5e-5, warmup_steps=10, total_steps=STAGE1_RUN.steps
    ),
    data=Mixture((*STAGE1_RUN.data.sources, ("text", "miniature/data/text", 1.0))),
)

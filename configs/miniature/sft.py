"""SFT: conversations, spoken and written, all four ways; the loss is on what the assistant says.

moss-jax train --config configs/miniature/sft.py
"""

import dataclasses
import runpy
from pathlib import Path

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig
from moss_jax.train.speech_lm.stages import SFT

BEFORE = runpy.run_path(str(Path(__file__).with_name("stage1.py")))["RUN"]
RUN = dataclasses.replace(
    BEFORE,
    name="miniature-sft",
    folder="miniature/runs/sft",
    init="miniature/runs/stage2",
    split=None,
    stage=SFT,
    optimizer=OptimizerConfig(learning_rate=5e-4, final_learning_rate=5e-5, warmup_steps=10, total_steps=BEFORE.steps),
    data=Mixture((("chat", "miniature/data/chat", 1.0),)),
    held_out=Mixture((("chat", "miniature/data/chat-valid", 1.0),)),
)

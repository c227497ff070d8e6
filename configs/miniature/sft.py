"""Supervised fine-tuning on conversations: questions and answers, each spoken or written.

  moss-jax train --config configs/miniature/sft.py

Starts from the last export of stage 2. The loss is computed on the assistant's turns only.
"""

from dataclasses import replace
from pathlib import Path

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, load_run
from moss_jax.train.speech_lm.stages import SFT

STAGE1_RUN = load_run(Path(__file__).with_name("stage1.py"))

RUN = replace(
    STAGE1_RUN,
    name="miniature-sft",
    folder="miniature/runs/sft",
    init="miniature/runs/stage2",
    split=None,
    stage=SFT,
    optimizer=OptimizerConfig(
        learning_rate=5e-4, final_learning_rate=5e-5, warmup_steps=10, total_steps=STAGE1_RUN.steps
    ),
    data=Mixture((("chat", "miniature/data/chat", 1.0),)),
    held_out=Mixture((("chat", "miniature/data/chat-valid", 1.0),)),
)

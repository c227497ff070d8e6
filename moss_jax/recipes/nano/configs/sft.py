"""Nano's SFT: conversations of one or more turns, in all combinations of speech and text; the loss is on the answers.

moss-jax train --config moss_jax/recipes/nano/configs/sft.py

About 24 minutes on two cores. The export has bfloat16 weights, as the bundled system.
"""

import dataclasses
import runpy
from pathlib import Path

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig
from moss_jax.train.speech_lm.stages import SFT

BEFORE = runpy.run_path(str(Path(__file__).with_name("stage2.py")))["RUN"]
STEPS = 2400
RUN = dataclasses.replace(
    BEFORE,
    name="nano-sft",
    folder="nano/runs/sft",
    init="nano/runs/stage2",
    stage=SFT,
    optimizer=OptimizerConfig(
        method="muon",
        learning_rate=2.5e-3,
        final_learning_rate=2e-5,
        warmup_steps=50,
        total_steps=STEPS,
        weight_decay=0.05,
    ),
    data=Mixture(
        (
            ("chat", "nano/data/chat", 8.0),
            ("asr", "nano/data/asr", 1.0),
            ("tts", "nano/data/tts", 1.0),
        )
    ),
    held_out=Mixture((("chat", "nano/data/chat-valid", 1.0),)),
    steps=STEPS,
    evaluate_every=200,
    export_dtype="bfloat16",
)

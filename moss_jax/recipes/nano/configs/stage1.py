"""Nano's stage 1: the text model is split into two branches and frozen; the new parameters for speech are trained.

moss-jax train --config moss_jax/recipes/nano/configs/stage1.py

About 4 minutes on two cores. The held-out loss of text does not change at all.
"""

from moss_jax.data import Mixture
from moss_jax.recipes.nano.sizes import LANGUAGE_MODEL
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.stages import STAGE_1

STEPS = 300
RUN = Run(
    name="nano-stage1",
    folder="nano/runs/stage1",
    init="nano/qwen3",
    split=LANGUAGE_MODEL.num_modality_layers,
    system="nano/base",
    stage=STAGE_1,
    optimizer=OptimizerConfig(
        method="muon",
        learning_rate=2.5e-3,
        final_learning_rate=3e-4,
        warmup_steps=50,
        total_steps=STEPS,
        weight_decay=0.05,
    ),
    data=Mixture(
        (
            ("interleaved", "nano/data/interleaved", 1.0),
            ("asr", "nano/data/asr", 2.0),
            ("tts", "nano/data/tts", 2.0),
        )
    ),
    held_out=Mixture((("text", "nano/data/text-valid", 1.0),)),
    context=256,
    batch_size=8,
    steps=STEPS,
    dtype="float32",
    frozen_dtype=None,
    remat="none",
    save_every=100,
    evaluate_every=100,
    evaluate_batches=2,
    log_every=50,
)

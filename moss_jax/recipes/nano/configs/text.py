"""Nano's text model: a Qwen3 of 7 layers, trained on written statements, questions and answers of the domain.

  moss-jax train --config moss_jax/recipes/nano/configs/text.py
  moss-jax convert --model nano/runs/text/exports/900 --export qwen3 -o nano/qwen3

The shared layers and the text branch are trained. `moss-jax train-nano` runs this and all other steps. About 8 minutes
on two cores.
"""

from moss_jax.data import Mixture
from moss_jax.recipes.nano.sizes import LANGUAGE_MODEL
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.stages import Stage

STEPS = 900
RUN = Run(
    name="nano-text",
    folder="nano/runs/text",
    init="random",
    model=LANGUAGE_MODEL,
    system="nano/base",
    stage=Stage("text", ("shared/*", "text/*"), audio_weight=0.0),
    optimizer=OptimizerConfig(
        method="muon",
        learning_rate=2.5e-3,
        final_learning_rate=5e-5,
        warmup_steps=50,
        total_steps=STEPS,
        weight_decay=0.05,
    ),
    data=Mixture((("text", "nano/data/text", 1.0),)),
    held_out=Mixture((("text", "nano/data/text-valid", 1.0),)),
    context=128,
    batch_size=16,
    steps=STEPS,
    dtype="float32",
    frozen_dtype=None,
    remat="none",
    save_every=100,
    evaluate_every=100,
    evaluate_batches=2,
    log_every=50,
)

"""A tiny Qwen3 learns the facts of the corpus from text: the shared layers and the text branch train.

  moss-jax train --config configs/miniature/text.py
  moss-jax convert --model miniature/runs/text/exports/200 --export qwen3 -o miniature/qwen3

Expect a text loss of 6.4 at the first step and below 0.2 after 200 steps, in a minute or two on two cores.
"""

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.stages import Stage

STEPS = 200
RUN = Run(
    name="miniature-text",
    folder="miniature/runs/text",
    init="miniature/system",
    stage=Stage("text", ("shared/*", "text/*"), audio_weight=0.0),
    optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=20, total_steps=STEPS),
    data=Mixture((("text", "miniature/data/text", 1.0),)),
    held_out=Mixture((("text", "miniature/data/text-valid", 1.0),)),
    context=256,
    batch_size=8,
    steps=STEPS,
    dtype="float32",
    frozen_dtype=None,
    remat="none",
    save_every=100,
    log_every=50,
)

"""Supervised fine-tuning of the 8B model on conversations with spoken and written turns.

  moss-jax train --config configs/sft.py [--distributed]
  moss-jax chat --model runs/sft/exports/1400 QUESTION.wav -o ANSWER.wav

Starts from the last export of stage 2. The loss is computed on the assistant's turns only.
Expect an audio loss below that of stage 2, because all replies are in one voice.
v5e-256: add --set mesh.sequence=8. One host of eight GPUs: add --set accumulate=20 (one sequence per GPU at a time).
Source: arXiv 2510.00499 (1e-5 to 1e-6, context 10240, packed, two epochs; the batch is given as 8 without a unit).
"""

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.stages import SFT

STEPS = 1_400

RUN = Run(
    name="sft-8b",
    folder="runs/sft",
    init="runs/stage2",
    stage=SFT,
    optimizer=OptimizerConfig(
        learning_rate=1e-5, final_learning_rate=1e-6, warmup_steps=50, total_steps=STEPS, weight_decay=0.1
    ),
    data=Mixture((("chat", "data/chat", 1.0),)),
    held_out=Mixture((("chat", "data/chat-valid", 1.0),)),
    context=10240,
    batch_size=64,
    steps=STEPS,
    workers=4,
    save_every=100,
    evaluate_every=100,
    evaluate_batches=4,
)

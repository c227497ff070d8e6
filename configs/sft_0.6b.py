"""Fine-tuning of a model of Qwen3-0.6B's size on conversations: speech or text in, speech or text out.

  moss-jax train --config configs/sft_0.6b.py [--distributed]
  moss-jax chat --model runs/sft_0.6b/exports/3000 QUESTION.wav -o ANSWER.wav

Goes on from the last export of stage 2. Only what the assistant says is scored. Expect an audio loss below stage 2's:
one voice answers.
One card or one host: as it is; where memory ends, add --set accumulate=8.
Source: arXiv 2510.00499 (1e-5 to 1e-6, context 10240, packed, two epochs; the batch is given as 8 without a unit).
"""

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.stages import SFT

STEPS = 3_000

RUN = Run(
    name="sft-0.6b",
    folder="runs/sft_0.6b",
    init="runs/stage2_0.6b",
    stage=SFT,
    optimizer=OptimizerConfig(
        learning_rate=1e-5, final_learning_rate=1e-6, warmup_steps=50, total_steps=STEPS, weight_decay=0.1
    ),
    data=Mixture((("chat", "data/chat", 1.0),)),
    held_out=Mixture((("chat", "data/chat-valid", 1.0),)),
    context=10240,
    batch_size=16,
    steps=STEPS,
    workers=4,
    save_every=100,
    evaluate_every=100,
    evaluate_batches=4,
)

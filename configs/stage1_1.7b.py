"""Stage 1 of a model of Qwen3-1.7B's size: the audio branch learns to speak beside a frozen Qwen3.

  moss-jax convert --from-qwen3 Qwen/Qwen3-1.7B --codec fnlp/MOSS-Speech-Codec -o systems/Qwen3-1.7B
  moss-jax train --config configs/stage1_1.7b.py [--distributed]

Trains the audio table, block, norm and head; every text parameter stays as it is, bit for bit, in bfloat16. The text
loss counts: through the frozen text branch it teaches the audio table. Expect the audio loss to begin at
ln(16512) = 9.7 and the text loss on text pieces to stay what it was.
One host of eight GPUs or chips: as it is. One card: add --set accumulate=16.
Source: arXiv 2510.00499 (AdamW, cosine, 4e-4, weight decay 0.1, 2.2 M rows a step); warm-up and clipping are ours.
"""

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.stages import STAGE_1

STEPS = 20_000

RUN = Run(
    name="stage1-1.7b",
    folder="runs/stage1_1.7b",
    init="systems/Qwen3-1.7B",
    stage=STAGE_1,
    optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=1_000, total_steps=STEPS, weight_decay=0.1),
    data=Mixture(
        (
            ("interleaved", "data/interleaved", 1.0),
            ("synthetic", "data/synthetic", 1.0),
            ("speech", "data/speech", 1.4),
        )
    ),
    held_out=Mixture((("interleaved", "data/interleaved-valid", 1.0), ("speech", "data/speech-valid", 1.0))),
    context=14336,
    batch_size=32,
    steps=STEPS,
    workers=4,
    save_every=500,
    evaluate_every=1_000,
    evaluate_batches=4,
    export_every=10_000,
)

"""Stage 1 of the 8B model: the audio branch learns speech while the Qwen3 weights are frozen.

  moss-jax convert --from-qwen3 Qwen/Qwen3-8B --codec fnlp/MOSS-Speech-Codec -o systems/Qwen3-8B
  moss-jax train --config configs/stage1.py [--distributed]

Trains the audio embedding, branch, norm and head. The text parameters are frozen in bfloat16 and stay bit-identical.
The text loss is part of the loss: its gradient reaches the audio embedding through the frozen text branch.
Expect the audio loss to start at ln(16512) = 9.7, and the text loss on text segments to stay constant.
v5e-256: add --set mesh.sequence=8. One host of eight GPUs: add --set accumulate=20 (one sequence per GPU at a time).
Source: arXiv 2510.00499 (AdamW, cosine, 4e-4, weight decay 0.1, 2.2 M rows a step); warm-up and clipping are ours.
"""

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.stages import STAGE_1

STEPS = 80_000

RUN = Run(
    name="stage1-8b",
    folder="runs/stage1",
    init="systems/Qwen3-8B",
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
    batch_size=160,
    steps=STEPS,
    workers=4,
    save_every=500,
    evaluate_every=1_000,
    evaluate_batches=4,
    export_every=10_000,
)

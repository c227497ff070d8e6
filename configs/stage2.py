"""Stage 2 of the 8B model: all parameters train, on speech and some text.

  moss-jax train --config configs/stage2.py [--distributed]

Starts from the last export of stage 1 (--init selects another start). To train only the shared layers, or only the last
8 of them:
  --set stage.trainable="['shared/*']"        --set stage.last_shared_layers=8
Expect both losses to decrease; the text loss on text alone rises a little at first and then recovers.
v5e-256: add --set mesh.sequence=8. One host of eight GPUs: add --set accumulate=20 (one sequence per GPU at a time).
Source: arXiv 2510.00499 (AdamW, 6e-5 to 6e-6, 2.8 M rows a step; speech twice, a tenth of an epoch of text).
"""

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.stages import STAGE_2

STEPS = 130_000

RUN = Run(
    name="stage2-8b",
    folder="runs/stage2",
    init="runs/stage1",
    stage=STAGE_2,
    optimizer=OptimizerConfig(
        learning_rate=6e-5, final_learning_rate=6e-6, warmup_steps=1_000, total_steps=STEPS, weight_decay=0.1
    ),
    data=Mixture(
        (
            ("interleaved", "data/interleaved", 1.0),
            ("synthetic", "data/synthetic", 1.0),
            ("speech", "data/speech", 1.4),
            ("text", "data/text", 0.3),
        )
    ),
    held_out=Mixture(
        (
            ("interleaved", "data/interleaved-valid", 1.0),
            ("speech", "data/speech-valid", 1.0),
            ("text", "data/text-valid", 1.0),
        )
    ),
    context=14336,
    batch_size=192,
    steps=STEPS,
    workers=4,
    save_every=500,
    evaluate_every=1_000,
    evaluate_batches=4,
    export_every=10_000,
)

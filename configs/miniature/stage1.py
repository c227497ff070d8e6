"""Stage 1: everything that came from the Qwen3 is frozen, the audio embedding, branch and head learn.

moss-jax train --config configs/miniature/stage1.py
"""

from moss_jax.data import Mixture
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.run import Run
from moss_jax.train.stages import STAGE_1

STEPS = 200
RUN = Run(
    name="miniature-stage1",
    folder="miniature/runs/stage1",
    init="miniature/qwen3",
    split=2,
    system="miniature/system",
    stage=STAGE_1,
    optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=2e-4, warmup_steps=20, total_steps=STEPS),
    data=Mixture(
        (
            ("interleaved", "miniature/data/interleaved", 2.0),
            ("tts", "miniature/data/tts", 1.0),
            ("asr", "miniature/data/asr", 1.0),
            ("recordings", "miniature/data/recordings", 0.2),
        )
    ),
    held_out=Mixture((("text", "miniature/data/text-valid", 1.0),)),
    context=256,
    batch_size=8,
    steps=STEPS,
    dtype="float32",
    frozen_dtype=None,
    remat="none",
    save_every=100,
    evaluate_every=100,
    log_every=50,
)

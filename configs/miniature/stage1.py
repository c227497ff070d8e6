"""Stage 1: everything that came from the Qwen3 is frozen, the audio embedding, branch and head learn.

  moss-jax train --config configs/miniature/stage1.py

Expect: an audio loss from 6.0 to about 2 in 100 steps, a minute or two on two cores; the held-out loss of text stays
what it was to the last digit.
"""

from pathlib import Path

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.stages import STAGE_1

STEPS = 100
SOURCES = (
    ("interleaved", "miniature/data/interleaved", 2.0),
    ("tts", "miniature/data/tts", 1.0),
    ("asr", "miniature/data/asr", 1.0),
    ("recordings", "miniature/data/recordings", 0.2),  # where there are any
)
RUN = Run(
    name="miniature-stage1",
    folder="miniature/runs/stage1",
    init="miniature/qwen3",
    split=2,
    system="miniature/system",
    stage=STAGE_1,
    optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=2e-4, warmup_steps=20, total_steps=STEPS),
    data=Mixture(tuple(source for source in SOURCES if Path(source[1]).is_dir() or source[0] != "recordings")),
    held_out=Mixture((("text", "miniature/data/text-valid", 1.0),)),
    context=256,
    batch_size=8,
    steps=STEPS,
    dtype="float32",
    frozen_dtype=None,
    remat="none",
    save_every=50,
    evaluate_every=50,
    log_every=25,
)

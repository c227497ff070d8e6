"""Stage 1: the weights of the Qwen3 are frozen; the audio embedding, branch, norm and head train.

  moss-jax train --config configs/miniature/stage1.py

Expect the audio loss to fall from 6.0 to about 2 in 100 steps, in a minute or two on two cores. The held-out text loss
does not change in any digit.
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
    ("recordings", "miniature/data/recordings", 0.2),
)
# launch/miniature.sh makes this source only if it is given recordings.
HAS_RECORDINGS = Path("miniature/data/recordings").is_dir()

RUN = Run(
    name="miniature-stage1",
    folder="miniature/runs/stage1",
    init="miniature/qwen3",
    split=2,
    system="miniature/system",
    stage=STAGE_1,
    optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=2e-4, warmup_steps=20, total_steps=STEPS),
    data=Mixture(tuple(source for source in SOURCES if source[0] != "recordings" or HAS_RECORDINGS)),
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

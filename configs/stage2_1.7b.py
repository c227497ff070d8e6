"""Stage 2 of a model of the size of Qwen3-1.7B: configs/stage2.py with a smaller batch and fewer steps.

  moss-jax train --config configs/stage2_1.7b.py [--distributed]

Starts from the last export of stage 1. Expect both losses to decrease; the text loss on text alone rises a little at
first and then recovers.
One host with eight GPUs or chips: use it as it is. One GPU: add --set accumulate=16.
"""

from pathlib import Path

from moss_jax.train import load_run

# The same as --set on the command line.
CHANGES = (
    "name=stage2-1.7b",
    "folder=runs/stage2_1.7b",
    "init=runs/stage1_1.7b",
    "batch_size=32",
    "steps=40000",
)

RUN = load_run(Path(__file__).with_name("stage2.py"), CHANGES)

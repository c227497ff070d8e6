"""Stage 2 of a model of the size of Qwen3-0.6B: configs/stage2.py with a smaller batch and fewer steps.

  moss-jax train --config configs/stage2_0.6b.py [--distributed]

Starts from the last export of stage 1. Expect both losses to decrease; the text loss on text alone rises a little at
first and then recovers.
One GPU or one host: use it as it is; if memory runs out, add --set accumulate=8.
"""

from pathlib import Path

from moss_jax.train import load_run

# The same as --set on the command line.
CHANGES = (
    "name=stage2-0.6b",
    "folder=runs/stage2_0.6b",
    "init=runs/stage1_0.6b",
    "batch_size=16",
    "steps=40000",
)

RUN = load_run(Path(__file__).with_name("stage2.py"), CHANGES)

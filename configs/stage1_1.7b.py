"""Stage 1 of a model of the size of Qwen3-1.7B: configs/stage1.py with a smaller batch and fewer steps.

  moss-jax convert --from-qwen3 Qwen/Qwen3-1.7B --codec fnlp/MOSS-Speech-Codec -o systems/Qwen3-1.7B
  moss-jax train --config configs/stage1_1.7b.py [--distributed]

Expect the audio loss to start at ln(16512) = 9.7, and the text loss on text segments to stay constant.
One host with eight GPUs or chips: use it as it is. One GPU: add --set accumulate=16.
"""

from pathlib import Path

from moss_jax.train import load_run

# The same as --set on the command line.
CHANGES = (
    "name=stage1-1.7b",
    "folder=runs/stage1_1.7b",
    "init=systems/Qwen3-1.7B",
    "batch_size=32",
    "steps=20000",
)

RUN = load_run(Path(__file__).with_name("stage1.py"), CHANGES)

"""Stage 1 of a model of the size of Qwen3-0.6B: configs/stage1.py with a smaller batch and fewer steps.

  moss-jax convert --from-qwen3 Qwen/Qwen3-0.6B --codec fnlp/MOSS-Speech-Codec -o systems/Qwen3-0.6B
  moss-jax train --config configs/stage1_0.6b.py [--distributed]

Expect the audio loss to start at ln(16512) = 9.7, and the text loss on text segments to stay constant.
One GPU or one host: use it as it is; if memory runs out, add --set accumulate=8.
"""

from pathlib import Path

from moss_jax.train import load_run

# The same as --set on the command line.
CHANGES = (
    "name=stage1-0.6b",
    "folder=runs/stage1_0.6b",
    "init=systems/Qwen3-0.6B",
    "batch_size=16",
    "steps=20000",
)

RUN = load_run(Path(__file__).with_name("stage1.py"), CHANGES)

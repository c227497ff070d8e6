"""Supervised fine-tuning of a model of the size of Qwen3-1.7B: configs/sft.py with a smaller batch.

  moss-jax train --config configs/sft_1.7b.py [--distributed]
  moss-jax chat --model runs/sft_1.7b/exports/3000 QUESTION.wav -o ANSWER.wav

Starts from the last export of stage 2. Expect an audio loss below that of stage 2: all replies are in one voice.
One host with eight GPUs or chips: use it as it is. One GPU: add --set accumulate=16.
"""

from pathlib import Path

from moss_jax.train import load_run

# The same as --set on the command line.
CHANGES = (
    "name=sft-1.7b",
    "folder=runs/sft_1.7b",
    "init=runs/stage2_1.7b",
    "batch_size=32",
    "steps=3000",
)

RUN = load_run(Path(__file__).with_name("sft.py"), CHANGES)

"""Supervised fine-tuning of a model of the size of Qwen3-0.6B: configs/sft.py with a smaller batch.

  moss-jax train --config configs/sft_0.6b.py [--distributed]
  moss-jax chat --model runs/sft_0.6b/exports/3000 QUESTION.wav -o ANSWER.wav

Starts from the last export of stage 2. Expect an audio loss below that of stage 2: all replies are in one voice.
One GPU or one host: use it as it is; if memory runs out, add --set accumulate=8.
"""

from pathlib import Path

from moss_jax.train import load_run

# The same as --set on the command line.
CHANGES = (
    "name=sft-0.6b",
    "folder=runs/sft_0.6b",
    "init=runs/stage2_0.6b",
    "batch_size=16",
    "steps=3000",
)

RUN = load_run(Path(__file__).with_name("sft.py"), CHANGES)

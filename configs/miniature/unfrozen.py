"""The comparison for stage 1: the same start, data and steps, with nothing frozen.

  moss-jax train --config configs/miniature/unfrozen.py

Expect the held-out text loss to change, unlike in stage 1.
"""

from dataclasses import replace
from pathlib import Path

from moss_jax.train import load_run
from moss_jax.train.speech_lm.stages import STAGE_2

STAGE1_RUN = load_run(Path(__file__).with_name("stage1.py"))

RUN = replace(STAGE1_RUN, name="miniature-unfrozen", folder="miniature/runs/unfrozen", stage=STAGE_2)

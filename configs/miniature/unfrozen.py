"""What stage 1 is compared with: the same start, data and steps, but nothing is frozen.

  moss-jax train --config configs/miniature/unfrozen.py

Expect: the held-out loss of text moves, where stage 1 leaves it as it was to the last digit.
"""

import dataclasses
import runpy
from pathlib import Path

from moss_jax.train.speech_lm.stages import STAGE_2

BEFORE = runpy.run_path(str(Path(__file__).with_name("stage1.py")))["RUN"]
RUN = dataclasses.replace(BEFORE, name="miniature-unfrozen", folder="miniature/runs/unfrozen", stage=STAGE_2)

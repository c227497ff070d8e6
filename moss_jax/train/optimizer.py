"""AdamW or Muon with warm-up and a schedule, over the trainable parameters only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from moss_jax.checkpoint.config_io import ADDED_LATER
from moss_jax.errors import MossError

METHODS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd", "constant")
# Modules whose kernels are [layers, in, heads, head_dim] and [layers, heads, head_dim, out].
TO_HEADS = ("q", "k", "v")
FROM_HEADS = ("o",)
ADAMW_RMS = 0.2  # of an update's entries, about, at learning rate 1


@dataclass(frozen=True)
class OptimizerConfig:
    """After clipping by the global gradient norm: AdamW (decoupled weight decay on everything that trains), or Muon for
    the matrices of the layers and AdamW for the rest, with the same learning rate and weight decay for both.

    Source of Muon: arXiv 2502.16982, whose scale makes its updates as large as AdamW's (section 2.2).
    """

    learning_rate: float = 4e-4  # at the top
    final_learning_rate: float = 0.0  # at the end of "cosine" and "wsd"
    schedule: str = "cosine"  # one of SCHEDULES: a cosine down; a plateau and a straight way down; a plateau
    warmup_steps: int = 0  # straight up from 0
    total_steps: int = 1000  # steps of the whole run, warm-up included
    decay_steps: int = 0  # of "wsd": the last so many go down
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0  # largest global gradient norm; None: no clipping
    method: str = field(default="adamw", metadata=ADDED_LATER)  # one of METHODS

    def __post_init__(self):
        problems = []
        if self.method not in METHODS:
            problems.append(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.schedule not in SCHEDULES:
            problems.append(f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if not self.learning_rate > 0:
            problems.append(f"learning_rate is {self.learning_rate}, expected above 0")
        if self.total_steps < 1 or self.warmup_steps < 0 or self.decay_steps < 0:
            problems.append("steps below 0, or total_steps below 1")
        if self.warmup_steps + self.decay_steps > self.total_steps:
            problems.append(
                f"warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} are more than total_steps "
                f"{self.total_steps}"
            )
        if self.schedule == "wsd" and not self.decay_steps:
            problems.append("schedule 'wsd' needs decay_steps")
        if self.clip_norm is not None and not self.clip_norm > 0:
            problems.append(f"clip_norm is {self.clip_norm}, expected above 0 or None")
        if problems:
            raise MossError(f"optimizer config: {problems[0]}")


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the number of updates already made."""
    top = config.learning_rate
    end = config.final_learning_rate
    after = config.total_steps - config.warmup_steps
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(top, max(after, 1), end / top)
    elif config.schedule == "wsd":
        down = optax.linear_schedule(top, end, config.decay_steps)
        main = optax.join_schedules([optax.constant_schedule(top), down], [after - config.decay_steps])
    else:
        main = optax.constant_schedule(top)
    if not config.warmup_steps:
        return main
    # The first update already moves: warm-up ends, not begins, at a whole step.
    up = optax.linear_schedule(top / config.warmup_steps, top, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([up, main], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The transformation of gradients into updates; it sees trainable parameters only, so clipping does too."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    if config.method == "muon":
        first, second = config.betas
        return optax.chain(
            clip,
            muon(
                learning_rate(config),
                eps=config.eps,
                weight_decay=config.weight_decay,
                adam_b1=first,
                adam_b2=second,
                adam_weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=layer_matrices,
                consistent_rms=ADAMW_RMS,
            ),
        )
    return optax.chain(
        clip,
        optax.scale_by_adam(*config.betas, config.eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def layer_matrices(params: Mapping[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    """Of {path: parameter}, the axes of each matrix of a layer (stacked: [layers, ...]); None for what is no such
    matrix: embeddings, output heads, convolutions, vectors."""

    def axes(path: str, value: Any) -> MuonDimensionNumbers | None:
        *above, module, name = ["", *path.split("/")]
        if name != "kernel" or not any(part.endswith("layers") for part in above):
            return None
        shape = getattr(value, "shape", ())  # what is masked has none
        if len(shape) == 3:
            return MuonDimensionNumbers(1, 2)
        if len(shape) == 4 and module.removeprefix("cross_") in TO_HEADS:
            return MuonDimensionNumbers(1, (2, 3))
        if len(shape) == 4 and module.removeprefix("cross_") in FROM_HEADS:
            return MuonDimensionNumbers((1, 2), 3)
        return None

    return {path: axes(path, value) for path, value in params.items()}


def updates_made(opt_state) -> jax.Array:
    """How many updates an optimizer state has seen, int32: the argument of the schedule at the next one."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, optax.ScaleByScheduleState))
    found = [s.count for s in states if isinstance(s, optax.ScaleByScheduleState)]
    return found[0] if found else jnp.int32(0)

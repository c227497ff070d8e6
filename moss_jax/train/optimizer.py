"""AdamW or Muon with warm-up and a schedule, for the trainable parameters only."""

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
ADAMW_RMS = 0.2  # approximate RMS of the entries of an AdamW update at learning rate 1; arXiv 2502.16982, section 2.2


@dataclass(frozen=True)
class OptimizerConfig:
    """Clipping by the global gradient norm, then AdamW with decoupled weight decay on all trainable parameters, or Muon
    for the matrices of the layers and AdamW for the rest, with the same learning rate and weight decay for both.

    Source of Muon: arXiv 2502.16982, which scales its updates to the size of AdamW's (section 2.2).
    """

    learning_rate: float = 4e-4  # the maximum, after warm-up
    final_learning_rate: float = 0.0  # after the decay of "cosine" and "wsd"
    schedule: str = "cosine"  # one of SCHEDULES; wsd (warmup-stable-decay) is constant until a final linear decay
    warmup_steps: int = 0  # linear, from 0
    total_steps: int = 1000  # steps of the whole run, warm-up included
    decay_steps: int = 0  # length of the final decay of "wsd"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0  # maximum global gradient norm; None: no clipping
    method: str = field(default="adamw", metadata=ADDED_LATER)  # one of METHODS

    def __post_init__(self) -> None:
        problems = []
        if self.method not in METHODS:
            problems.append(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.schedule not in SCHEDULES:
            problems.append(f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if not self.learning_rate > 0:
            problems.append(f"learning_rate is {self.learning_rate}, expected above 0")
        for name, minimum in (("total_steps", 1), ("warmup_steps", 0), ("decay_steps", 0)):
            if getattr(self, name) < minimum:
                problems.append(f"{name} is {getattr(self, name)}, expected at least {minimum}")
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
    """The learning rate as a function of the number of updates that have been made."""
    peak = config.learning_rate
    end = config.final_learning_rate
    after = config.total_steps - config.warmup_steps
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(after, 1), end / peak)
    elif config.schedule == "wsd":
        decay = optax.linear_schedule(peak, end, config.decay_steps)
        main = optax.join_schedules([optax.constant_schedule(peak), decay], [after - config.decay_steps])
    else:
        main = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return main
    # The first update must not have a learning rate of 0, so the warm-up starts one step above it.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The transformation of gradients into updates; the norm that is clipped is that of the trainable parameters."""
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
    """The parameters that Muon updates: the matrices of the layers, which are stacked as [layers, ...].

    Returns:
        {path: axes of the matrix}, or None instead of the axes for embeddings, output heads, convolutions and vectors.
    """

    def axes(path: str, value: Any) -> MuonDimensionNumbers | None:
        *above, module, name = f"/{path}".split("/")
        if name != "kernel" or not any(part.endswith("layers") for part in above):
            return None
        shape = getattr(value, "shape", ())  # optax's mask has none
        if len(shape) == 3:
            return MuonDimensionNumbers(1, 2)
        if len(shape) == 4 and module.removeprefix("cross_") in TO_HEADS:
            return MuonDimensionNumbers(1, (2, 3))
        if len(shape) == 4 and module.removeprefix("cross_") in FROM_HEADS:
            return MuonDimensionNumbers((1, 2), 3)
        return None

    return {path: axes(path, value) for path, value in params.items()}


def updates_made(opt_state: Any) -> jax.Array:
    """The number of updates in an optimizer state, int32: the argument of the schedule for the next update."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, optax.ScaleByScheduleState))
    counts = [s.count for s in states if isinstance(s, optax.ScaleByScheduleState)]
    return counts[0] if counts else jnp.int32(0)

"""AdamW with warm-up and a schedule, over the trainable parameters only."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from moss_jax.errors import MossError

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (decoupled weight decay on everything that trains) after clipping by the global gradient norm."""

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

    def __post_init__(self):
        problems = []
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
    top, end = config.learning_rate, config.final_learning_rate
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
    return optax.chain(
        clip,
        optax.scale_by_adam(*config.betas, config.eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def updates_made(opt_state) -> jax.Array:
    """How many updates an optimizer state has seen, int32: the argument of the schedule at the next one."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, optax.ScaleByScheduleState))
    found = [s.count for s in states if isinstance(s, optax.ScaleByScheduleState)]
    return found[0] if found else jnp.int32(0)

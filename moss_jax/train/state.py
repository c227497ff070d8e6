"""The state that a training step changes, its shardings, and one guarded update of it; the same for every model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from moss_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer, updates_made

Flat = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """What a step changes. `step` counts all batches; the optimizer's own count leaves out skipped updates."""

    step: jax.Array  # int32
    params: Flat  # float32, the trainable parameters only
    opt_state: Any
    extra: Any = ()  # what changes without a gradient (statistics, averages); part of checkpoints


def new_state(trainable: Flat, optimizer: OptimizerConfig, extra: Any = ()) -> TrainState:
    """The state before the first step. May be traced."""
    return TrainState(jnp.int32(0), dict(trainable), make_optimizer(optimizer).init(dict(trainable)), extra)


def init_state(trainable: Flat, optimizer: OptimizerConfig) -> TrainState:
    """The state before the first step; moments have the shardings of their parameters.

    The arrays of `trainable` become part of the state: the first step donates them.
    """
    init = make_optimizer(optimizer).init
    step = jnp.int32(0)
    sharding = next(iter(trainable.values())).sharding
    if not isinstance(sharding, NamedSharding):
        return TrainState(step, dict(trainable), jax.jit(init)(dict(trainable)))
    replicated = NamedSharding(sharding.mesh, P())
    shapes = jax.eval_shape(init, dict(trainable))
    shardings = _like_parameters(shapes, {path: x.sharding for path, x in trainable.items()}, replicated)
    opt_state = jax.jit(init, out_shardings=shardings)(dict(trainable))
    return TrainState(jax.device_put(step, replicated), dict(trainable), opt_state)


def shardings_of(state: TrainState, params: Mapping[str, Sharding], mesh: Mesh) -> Any:
    """A TrainState with a sharding for each array: what belongs to a parameter (moments, averages) has the sharding of
    the parameter, everything else is replicated.

    Args:
        state: of shapes. An array belongs to a parameter when the parameter's path is one of the dictionary keys that
            lead to it.
        params: {path: sharding} of the parameters.
    """
    replicated = NamedSharding(mesh, P())
    fields: dict[str, Any] = {
        "step": replicated,
        "params": dict(params),
        "opt_state": _like_parameters(state.opt_state, params, replicated),
        "extra": _like_parameters(state.extra, params, replicated),
    }
    return TrainState(**fields)


def apply_update(
    state: TrainState,
    grads: Flat,
    loss: jax.Array,
    limit: ArrayLike,
    optimizer: OptimizerConfig,
    extra: Any = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of all parameters, which is skipped when the loss or the gradient is not acceptable.

    Args:
        limit: float32, the largest accepted loss and the largest accepted gradient norm: [2], or one number for both.
            When either is exceeded or not finite, parameters, optimizer state and `extra` are not changed.
        extra: its new value.

    Returns:
        (the state, {"grad_norm" before clipping, "learning_rate", "skipped" 0 or 1}, all float32)
    """
    norm = jnp.sqrt(sum(jnp.square(x).sum() for x in grads.values()))
    ok = accepted(loss, norm, limit)
    updates, opt_state = make_optimizer(optimizer).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state, extra = jax.tree.map(
        lambda new, old: jnp.where(ok, new, old),
        (params, opt_state, extra),
        (state.params, state.opt_state, state.extra),
    )
    rate = learning_rate(optimizer)(updates_made(state.opt_state))
    metrics = {"grad_norm": norm, "learning_rate": jnp.float32(rate), "skipped": 1 - ok.astype(jnp.float32)}
    return TrainState(state.step + 1, params, opt_state, extra), metrics


def accepted(loss: jax.Array, norm: jax.Array, limit: ArrayLike) -> jax.Array:
    """Whether an update may be applied: loss and gradient norm are finite and within `limit` (see `apply_update`)."""
    limits = jnp.broadcast_to(jnp.asarray(limit, jnp.float32), (2,))
    return jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= limits[0]) & (norm <= limits[1])


def _like_parameters(tree: Any, params: Mapping[str, Sharding], default: Sharding) -> Any:
    def sharding(path: tuple[Any, ...], leaf: Any) -> Sharding:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return next((params[key] for key in keys if key in params), default)

    return jax.tree.map_with_path(sharding, tree)

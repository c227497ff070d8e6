"""What a training step changes, how it lies on a mesh, and one guarded update of it; the same for every model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer, updates_made

Flat = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """What a step changes. `step` counts batches; skipped ones count too, but not in the optimizer's own count."""

    step: jax.Array  # int32
    params: Flat  # float32, the trainable parameters only
    opt_state: Any
    extra: Any = ()  # what changes without a gradient (statistics, averages); checkpoints hold it too


def new_state(trainable: Flat, optimizer: OptimizerConfig, extra: Any = ()) -> TrainState:
    """The state before the first step; may be traced."""
    return TrainState(jnp.int32(0), dict(trainable), make_optimizer(optimizer).init(dict(trainable)), extra)


def init_state(trainable: Flat, optimizer: OptimizerConfig) -> TrainState:
    """The state before the first step; moments lie where their parameters lie.

    The arrays are handed over: the first step takes their memory.
    """
    transformation = make_optimizer(optimizer)
    meshes = {getattr(x.sharding, "mesh", None) for x in trainable.values()}
    mesh = meshes.pop()
    shardings = None
    if mesh is not None:
        placed = {path: x.sharding for path, x in trainable.items()}
        shape = jax.eval_shape(transformation.init, dict(trainable))
        shardings = _beside(shape, placed, NamedSharding(mesh, P()))
    step = jnp.int32(0) if mesh is None else jax.device_put(jnp.int32(0), NamedSharding(mesh, P()))
    return TrainState(step, dict(trainable), jax.jit(transformation.init, out_shardings=shardings)(dict(trainable)))


def shardings_of(state: TrainState, params: Mapping[str, NamedSharding], mesh: Mesh) -> TrainState:
    """A TrainState of shardings: what belongs to a parameter (moments, averages) lies as it does, the rest everywhere.

    Args:
        state: of shapes. What has a parameter's path among the keys that lead to it belongs to that parameter.
        params: {path: sharding} of the parameters.
    """
    everywhere = NamedSharding(mesh, P())
    return TrainState(
        everywhere,
        dict(params),
        _beside(state.opt_state, params, everywhere),
        _beside(state.extra, params, everywhere),
    )


def updated(
    state: TrainState, grads: Flat, loss: jax.Array, limit: jax.Array, optimizer: OptimizerConfig, extra: Any = ()
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of all parameters, made only where the loss and the gradient are in order.

    Args:
        limit: float32, the largest loss and the largest gradient norm that are accepted: one number, or [2] for the
            two. When either is not finite or above, parameters, optimizer state and `extra` stay as they are.
        extra: the new one.

    Returns:
        (the state, {"grad_norm" before clipping, "learning_rate", "skipped" 0 or 1}, all float32)
    """
    norm = jnp.sqrt(sum(jnp.square(x).sum() for x in grads.values()))
    good = accepted(loss, norm, limit)
    updates, opt_state = make_optimizer(optimizer).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state, extra = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, opt_state, extra),
        (state.params, state.opt_state, state.extra),
    )
    rate = learning_rate(optimizer)(updates_made(state.opt_state))
    metrics = {"grad_norm": norm, "learning_rate": jnp.float32(rate), "skipped": 1 - good.astype(jnp.float32)}
    return TrainState(state.step + 1, params, opt_state, extra), metrics


def accepted(loss: jax.Array, norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Whether an update may be made: loss and gradient norm are finite and within `limit` (see `updated`)."""
    limits = jnp.broadcast_to(jnp.asarray(limit, jnp.float32), (2,))
    return jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= limits[0]) & (norm <= limits[1])


def _beside(tree: Any, params: Mapping[str, NamedSharding], everywhere: NamedSharding) -> Any:
    def place(path, _):
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return next((params[key] for key in keys if key in params), everywhere)

    return jax.tree.map_with_path(place, tree)

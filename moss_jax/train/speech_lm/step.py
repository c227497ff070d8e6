"""The training step: both losses, the gradient of the trainable parameters, one optimizer update.

    trainable, frozen = split_params(params, stage)
    step = make_step(config, stage, optimizer, mesh=mesh)
    state = init_state(trainable, optimizer)  # of moss_jax.train.state
    with jax.set_mesh(mesh):
        state, metrics = step(state, frozen, batch)

The state is donated; frozen parameters are a read-only argument. Trainable parameters are float32 and the forward pass
runs in `config.dtype`; statistics of norms, softmax, losses, sums of gradients and the update are float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_jax.errors import MossError
from moss_jax.nn.tree import unflatten
from moss_jax.sharding import constrain, fitting, shardings_for
from moss_jax.speech_lm import LayerSplitModel, SpeechLMConfig
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.speech_lm.lora import is_adapter, scaled
from moss_jax.train.speech_lm.losses import channel_sums, mean_or_zero, next_row_targets, token_nll
from moss_jax.train.speech_lm.stages import STACK, Stage, stage_axes, stage_shapes
from moss_jax.train.state import TrainState, apply_update, new_state, shardings_of

Flat = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]
LOWER_STACK = "shared_lower/layers/"  # of LayerSplitModel: the frozen layers below those of STACK that train
MAX_UNROLLED_LAYERS = 16  # the compile time of unrolled layers grows with depth; nano has 9, the 8B model 40
BATCH_AXES = {
    "grid": ("batch", "length", None),
    "positions": ("batch", "length"),
    "segment_ids": ("batch", "length"),
    "loss_weights": ("batch", "length", None),
    "source": ("batch", "length"),
}


def hidden(
    config: SpeechLMConfig,
    trainable: Flat,
    frozen: Flat,
    batch: Batch,
    stage: Stage | None = None,
    unroll: bool = False,
) -> dict[str, jax.Array]:
    """`LayerSplitModel.hidden` of parameters in two parts: {channel: [B, T, D]} in the compute dtype."""
    adapters = {path: value for path, value in trainable.items() if is_adapter(path)}
    flat = frozen | {path: value for path, value in trainable.items() if path not in adapters}
    # Shared layers in both parts: the lower ones are frozen and become a stack of their own, so that no gradient of
    # them is computed.
    num_lower_layers = 0
    for path in frozen.keys() & trainable.keys():
        flat[LOWER_STACK + path.removeprefix(STACK)] = frozen[path]
        num_lower_layers = frozen[path].shape[0]
    variables = {"params": unflatten(flat)}
    if adapters:
        assert stage is not None and stage.lora is not None, "adapters need the stage that made them"
        variables["lora"] = unflatten(scaled(stage.lora, adapters, jnp.dtype(config.dtype)))
    model = LayerSplitModel(config, num_lower_layers, unroll)
    inputs = (batch["grid"], batch["positions"], batch["segment_ids"])
    outputs: Any = model.apply(variables, *inputs, method="hidden")
    return outputs


def batch_nll(
    config: SpeechLMConfig,
    trainable: Flat,
    frozen: Flat,
    batch: Batch,
    stage: Stage | None = None,
    unroll: bool = False,
) -> dict[str, jax.Array]:
    """{channel: float32 [B, T]}: the loss of predicting row t + 1 in that channel."""
    labels = next_row_targets(batch)["labels"]
    outputs = hidden(config, trainable, frozen, batch, stage, unroll)
    heads = frozen | trainable
    return {
        channel.name: token_nll(outputs[channel.name], heads[f"{channel.name}/head/kernel"], labels[..., index])
        for index, channel in enumerate(config.channels)
    }


def batch_sums(
    config: SpeechLMConfig,
    stage: Stage,
    trainable: Flat,
    frozen: Flat,
    batch: Batch,
    counts: Mapping[str, jax.Array],
    sources: int,
    unroll: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The part of a global batch's loss that comes from this (micro-)batch, and the sums it consists of.

    Args:
        counts: {channel: sum of loss weights []} of the global batch.
    """
    targets = next_row_targets(batch)
    nll = batch_nll(config, trainable, frozen, batch, stage, unroll)
    loss = jnp.float32(0)
    sums = {}
    for index, channel in enumerate(config.channels):
        name = channel.name
        weights = targets["weights"][..., index]
        total, by_source, source_counts = channel_sums(nll[name], weights, targets["source"], sources)
        loss += stage.loss_weight(name) * mean_or_zero(total, counts[name])
        sums[f"{name}_sum"] = total
        sums[f"source_{name}_sum"] = by_source
        sums[f"source_{name}_count"] = source_counts
    return loss, sums


def gradients(
    config: SpeechLMConfig,
    stage: Stage,
    trainable: Flat,
    frozen: Flat,
    batch: Batch,
    *,
    accumulate: int = 1,
    sources: int = 1,
    unroll: bool = False,
) -> tuple[dict[str, jax.Array], Flat]:
    """(metrics of the loss, float32 gradients of the trainable parameters); the arguments are those of `make_step`."""
    counts = _counts(config, batch)

    def loss(compute: Flat, micro_batch: Batch) -> tuple[jax.Array, Flat]:
        return batch_sums(config, stage, compute, frozen, micro_batch, counts, sources, unroll)

    gradient = jax.value_and_grad(loss, has_aux=True)
    (total, sums), grads = _accumulate(gradient, _cast(trainable, jnp.dtype(config.dtype)), batch, accumulate)
    return {"loss": total} | _metrics(counts, sums), grads


def unrolled(config: SpeechLMConfig) -> bool:
    """Whether `make_step` should unroll the layers: on a CPU, if there are few enough to compile fast."""
    layers = config.num_shared_layers + config.num_modality_layers * len(config.channels)
    return jax.default_backend() == "cpu" and layers <= MAX_UNROLLED_LAYERS


def make_step(
    config: SpeechLMConfig,
    stage: Stage,
    optimizer: OptimizerConfig,
    *,
    accumulate: int = 1,
    sources: int = 1,
    mesh: Mesh | None = None,
    unroll: bool = False,
) -> Callable:
    """The compiled step: `step(state, frozen, batch, limit=inf) -> (state, metrics)`.

    `batch` is a dict of arrays [B, T, ...] (see `BATCH_AXES`). `limit`, float32, is the largest loss and the largest
    gradient norm that are accepted: one number, or [2] for the two. If either is not finite or above, parameters and
    optimizer state are unchanged and `skipped` is 1; `step` is counted all the same.

    Metrics are float32 scalars: loss, text_loss, audio_loss (means), text_count, audio_count (sums of weights),
    grad_norm (before clipping), learning_rate, skipped; and [sources] each: source_text_sum, source_text_count,
    source_audio_sum, source_audio_count.

    Args:
        accumulate: number of micro-batches; it must divide the rows.
        sources: number of values of `batch["source"]`.
        mesh: of the state, for calls under `jax.set_mesh(mesh)`; None: one device.
        unroll: no loop over layers in the compiled program: a third faster on a CPU, but compile time grows with
            depth; see `unrolled`.
    """

    def step(state: TrainState, frozen: Flat, batch: Batch, limit=jnp.inf):
        with jax.named_scope("gradient"):
            metrics, grads = gradients(
                config, stage, state.params, frozen, batch, accumulate=accumulate, sources=sources, unroll=unroll
            )
        with jax.named_scope("update"):
            state, update_metrics = apply_update(state, grads, metrics["loss"], limit, optimizer)
        return state, metrics | update_metrics

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    out = state_shardings(config, stage, optimizer, mesh), NamedSharding(mesh, P())
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def make_eval_step(config: SpeechLMConfig, stage: Stage, *, sources: int = 1) -> Callable:
    """The compiled `evaluate(trainable, frozen, batch) -> metrics`: the step's metrics of the loss alone.

    The [sources] sums and counts of several batches may be added up; the means may not.
    """

    @jax.jit
    def evaluate(trainable: Flat, frozen: Flat, batch: Batch):
        counts = _counts(config, batch)
        compute = _cast(trainable, jnp.dtype(config.dtype))
        loss, sums = batch_sums(config, stage, compute, frozen, batch, counts, sources)
        return {"loss": loss} | _metrics(counts, sums)

    return evaluate


def state_shardings(config: SpeechLMConfig, stage: Stage, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """A TrainState of shardings: parameters by the rules table, moments like their parameters, counters replicated."""
    shapes = jax.eval_shape(lambda trainable: new_state(trainable, optimizer), stage_shapes(config, stage)[0])
    return shardings_of(shapes, trainable_shardings(config, stage, mesh), mesh)


def trainable_shardings(config: SpeechLMConfig, stage: Stage, mesh: Mesh) -> dict[str, NamedSharding]:
    """Flat {path: sharding} of the trainable parameters, adapters included."""
    return shardings_for(stage_axes(config, stage)[0], stage_shapes(config, stage)[0], mesh)


def frozen_shardings(config: SpeechLMConfig, stage: Stage, mesh: Mesh) -> dict[str, NamedSharding]:
    """Flat {path: sharding} of the frozen parameters."""
    return shardings_for(stage_axes(config, stage)[1], stage_shapes(config, stage)[1], mesh)


def batch_shardings(mesh: Mesh, shape: tuple[int, int] | None = None) -> dict[str, NamedSharding]:
    """{name: sharding} of a batch of `shape` (rows, length): rows over data and fsdp, the length over sequence.

    Without `shape` every dimension is assumed to be divisible.
    """
    sizes = shape or (mesh.size, mesh.size)
    return {name: fitting(axes, (*sizes, 2)[: len(axes)], mesh) for name, axes in BATCH_AXES.items()}


def _cast(params: Flat, dtype: Any) -> Flat:
    """Trainable parameters in the compute dtype, cast before they are gathered on a mesh; adapters stay float32."""
    return {path: value if is_adapter(path) else value.astype(dtype) for path, value in params.items()}


def _counts(config: SpeechLMConfig, batch: Batch) -> Flat:
    """{channel: sum of its loss weights []} of a global batch."""
    weights = next_row_targets(batch)["weights"].sum((0, 1))
    return {channel.name: weights[index] for index, channel in enumerate(config.channels)}


def _accumulate(
    gradient: Callable[..., tuple[tuple[jax.Array, Flat], Flat]], params: Flat, batch: Batch, parts: int
) -> tuple[tuple[jax.Array, Flat], Flat]:
    """((loss, sums), float32 gradients), summed over `parts` micro-batches."""
    if parts == 1:
        result, grads = gradient(params, dict(batch))
        return result, _cast(grads, jnp.float32)
    rows = batch["grid"].shape[0]
    if rows % parts:
        raise MossError(f"accumulate is {parts}, expected a divisor of the batch's {rows} rows")
    # Every `parts`-th row, so that each device has some rows of each micro-batch.
    micro_batches = {
        name: constrain(rearrange(x, "(rows parts) ... -> parts rows ...", parts=parts), None, *BATCH_AXES[name])
        for name, x in batch.items()
    }

    def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradient(params, micro_batch)), None

    first = {name: x[0] for name, x in micro_batches.items()}
    shapes = jax.eval_shape(gradient, params, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    total, _ = jax.lax.scan(add, zeros, micro_batches)
    return total


def _metrics(counts: Flat, sums: Flat) -> Flat:
    """The metrics of the losses besides the total: means and counts by channel, sums and counts by source."""
    metrics = {name: value for name, value in sums.items() if name.startswith("source_")}
    for name, count in counts.items():
        metrics[f"{name}_loss"] = mean_or_zero(sums[f"{name}_sum"], count)
        metrics[f"{name}_count"] = count
    return metrics

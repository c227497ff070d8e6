"""Training stages as data: which parameters train, and the weights of the losses.

A stage is a name and patterns over parameter paths ("shared/layers/mlp/up/kernel"). Only selected parameters are
differentiated and have optimizer state; all others are read-only and stay bit-identical.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.speech_lm import SpeechLMConfig, model_axes, model_shapes
from moss_jax.train.speech_lm.lora import PREFIX, Lora, adapter_axes, is_adapter, merged, new_adapters

STACK = "shared/layers/"  # the only stack of which a stage may train just the last layers


@dataclass(frozen=True)
class Stage:
    """What one stage of training updates.

    `trainable` are glob patterns over flat parameter paths; `*` also matches '/'.
    """

    name: str
    trainable: tuple[str, ...]
    text_weight: float = 1.0  # of the mean loss over text targets
    audio_weight: float = 1.0  # of the mean loss over audio targets
    last_shared_layers: int | None = None  # of the selected shared layers only the last ones train; None: all of them
    lora: Lora | None = None  # adapters that train instead of their kernels

    def __post_init__(self):
        if self.lora is not None and self.last_shared_layers is not None:
            raise MossError(f"stage {self.name}: has adapters and last_shared_layers, expected one of them")

    def loss_weight(self, channel: str) -> float:
        """The weight of the mean loss over the targets of the channel "text" or "audio"."""
        return {"text": self.text_weight, "audio": self.audio_weight}[channel]

    def select(self, paths: Collection[str]) -> set[str]:
        """The paths that train; raises MossError if a pattern matches none of them."""
        selected: set[str] = set()
        for pattern in self.trainable:
            matches = {path for path in paths if fnmatchcase(path, pattern)}
            if not matches:
                raise MossError(f"stage {self.name}: pattern {pattern!r} matches no parameter, such as {min(paths)}")
            selected |= matches
        if self.last_shared_layers == 0:
            selected = {path for path in selected if not path.startswith(STACK)}
        return selected


STAGE_1 = Stage("stage1", ("audio/*",))
STAGE_2 = Stage("stage2", ("*",))
SHARED_ONLY = Stage("shared_only", ("shared/*",))
SFT = Stage("sft", ("*",))


def layerwise(last: int) -> Stage:
    """Unfreezing from the top: both branches with tables and heads, and the last `last` shared layers."""
    return Stage(f"layerwise_{last}", ("*",), last_shared_layers=last)


def with_lora(stage: Stage, lora: Lora, trainable: tuple[str, ...] = ()) -> Stage:
    """The stage with adapters instead of its trainable parameters; what `trainable` selects still trains itself."""
    return Stage(f"{stage.name}_lora", trainable, stage.text_weight, stage.audio_weight, lora=lora)


STAGES = {stage.name: stage for stage in (STAGE_1, STAGE_2, SHARED_ONLY, SFT)}


def split_params(
    params: Mapping[str, Any], stage: Stage, *, frozen_dtype: Any = None, seed: int = 0
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Parameters -> (trainable float32, frozen), both flat {path: array}.

    A stack of which only the last layers train is in both under the same path: the lower layers in the frozen part, the
    upper ones in the trainable part. New adapters are in the trainable part under `lora/...`.

    Args:
        params: nested or flat.
        frozen_dtype: of the frozen floating-point parameters; None keeps that of each.
        seed: of new adapters.
    """
    flat = flatten(params)
    selected = stage.select(flat)
    dtype = None if frozen_dtype is None else jnp.dtype(frozen_dtype)
    trainable = {}
    frozen = {}
    for path, value in flat.items():
        fixed: jax.Array | None = jnp.asarray(value)
        if path in selected:
            trained, fixed = _split_stack(path, jnp.asarray(value), stage)
            trainable[path] = trained.astype(jnp.float32)
        if fixed is not None:
            frozen[path] = fixed if dtype is None else fixed.astype(dtype)
    if stage.lora is not None:
        trainable |= new_adapters(stage.lora, {path: value.shape for path, value in frozen.items()}, seed)
    if not trainable:
        raise MossError(f"stage {stage.name}: has no trainable parameters, expected patterns or adapters")
    return trainable, frozen


def join_params(
    trainable: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], stage: Stage | None = None, dtype: Any = None
) -> dict[str, Any]:
    """Nested parameters of the whole model, as before `split_params`; adapters are merged into their kernels.

    Args:
        stage: needed if there are adapters.
        dtype: of the trained parameters in the result; None: float32. A kernel with adapters keeps its own.
    """
    flat = dict(frozen)
    for path, value in trainable.items():
        if is_adapter(path):
            continue
        if dtype is not None:
            value = value.astype(dtype)
        flat[path] = jnp.concatenate([frozen[path].astype(value.dtype), value]) if path in frozen else value
    if any(map(is_adapter, trainable)):
        if stage is None or stage.lora is None:
            raise MossError(f"merging adapters ({PREFIX}*) needs the stage that made them")
        flat |= merged(stage.lora, trainable, flat)
    return unflatten(flat)


def stage_shapes(
    config: SpeechLMConfig, stage: Stage, frozen_dtype: Any = None
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """(trainable, frozen) as flat {path: ShapeDtypeStruct}; nothing is allocated."""
    return jax.eval_shape(lambda p: split_params(p, stage, frozen_dtype=frozen_dtype), model_shapes(config))


def stage_axes(
    config: SpeechLMConfig, stage: Stage
) -> tuple[dict[str, tuple[str | None, ...]], dict[str, tuple[str | None, ...]]]:
    """(trainable, frozen) as flat {path: logical axis names}, for `moss_jax.sharding.shardings_for`."""
    axes = model_axes(config)
    trainable, frozen = stage_shapes(config, stage)
    trainable_axes = {path: adapter_axes(path, axes) if is_adapter(path) else axes[path] for path in trainable}
    frozen_axes = {path: axes[path] for path in frozen}
    return trainable_axes, frozen_axes


def _split_stack(path: str, value: jax.Array, stage: Stage) -> tuple[jax.Array, jax.Array | None]:
    """(layers that train, layers below them or None)."""
    if stage.last_shared_layers is None or not path.startswith(STACK):
        return value, None
    num_lower_layers = value.shape[0] - stage.last_shared_layers
    if num_lower_layers < 0:
        raise MossError(
            f"stage {stage.name}: last_shared_layers is {stage.last_shared_layers}, expected at most the model's "
            f"{value.shape[0]}"
        )
    if num_lower_layers == 0:
        return value, None
    return value[num_lower_layers:], value[:num_lower_layers]

"""Stages as data: which parameters train, and what counts in the loss.

A stage is a name and a rule over parameter paths ("shared/layers/mlp/up/kernel"). Only what the rule selects is
differentiated and has optimizer state; everything else is read only and stays bit-identical.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.speech_lm import SpeechLMConfig, model_axes, model_shapes
from moss_jax.train.speech_lm.lora import PREFIX, Lora, adapter_axes, is_adapter, merged, new_adapters

STACK = "shared/layers/"  # the stack of which a stage may train the last layers only


@dataclass(frozen=True)
class Stage:
    """What one stage of training changes.

    `trainable` are glob patterns over flat parameter paths; `*` also matches '/'.
    """

    name: str
    trainable: tuple[str, ...]
    text_weight: float = 1.0  # of the mean loss over text targets
    audio_weight: float = 1.0  # of the mean loss over audio targets
    last_shared_layers: int | None = None  # of the shared layers only so many, the last ones, train; None: all selected
    lora: Lora | None = field(default=None)  # adapters that train beside kernels which do not

    def __post_init__(self):
        if self.lora is not None and self.last_shared_layers is not None:
            raise MossError(f"stage {self.name}: has adapters and last_shared_layers, expected one of them")

    def loss_weight(self, channel: str) -> float:
        """The weight of the mean loss over the targets of the channel "text" or "audio"."""
        return {"text": self.text_weight, "audio": self.audio_weight}[channel]

    def select(self, paths: Collection[str]) -> set[str]:
        """The paths that train; raises MossError when a pattern matches none of them."""
        selected: set[str] = set()
        for pattern in self.trainable:
            found = {path for path in paths if fnmatchcase(path, pattern)}
            if not found:
                raise MossError(f"stage {self.name}: pattern {pattern!r} matches no parameter, such as {min(paths)}")
            selected |= found
        if self.last_shared_layers == 0:
            selected = {path for path in selected if not path.startswith(STACK)}
        return selected


STAGE_1 = Stage("stage1", ("audio/*",))
STAGE_2 = Stage("stage2", ("*",))
SHARED_ONLY = Stage("shared_only", ("shared/*",))
SFT = Stage("sft", ("*",))


def layerwise(last: int) -> Stage:
    """Layer by layer from the back: both branches and the last `last` shared layers; tables and heads as well."""
    return Stage(f"layerwise_{last}", ("*",), last_shared_layers=last)


def with_lora(stage: Stage, lora: Lora, trainable: tuple[str, ...] = ()) -> Stage:
    """The stage with adapters in place of its own trainable parameters, `trainable` excepted."""
    return Stage(f"{stage.name}_lora", trainable, stage.text_weight, stage.audio_weight, None, lora)


STAGES = {stage.name: stage for stage in (STAGE_1, STAGE_2, SHARED_ONLY, SFT)}


def split_params(
    params: Mapping[str, Any], stage: Stage, *, frozen_dtype: Any = None, seed: int = 0
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Parameters -> (trainable float32, frozen), both flat {path: array}.

    A stack of which only the last layers train is in both under one path: the lower layers frozen, the upper ones
    trainable. Adapters are new: `lora/...` among the trainable ones.

    Args:
        params: nested or flat.
        frozen_dtype: of the frozen floating-point parameters; None leaves each as it is.
        seed: of new adapters.
    """
    flat = flatten(params)
    selected = stage.select(flat)
    dtype = None if frozen_dtype is None else jnp.dtype(frozen_dtype)
    trainable = {}
    frozen = {}
    for path, value in flat.items():
        value = rest = jnp.asarray(value)
        if path in selected:
            value, rest = _split_stack(path, value, stage)
            trainable[path] = value.astype(jnp.float32)
        if rest is not None:
            frozen[path] = rest if dtype is None else rest.astype(dtype)
    if stage.lora is not None:
        trainable |= new_adapters(stage.lora, {path: value.shape for path, value in frozen.items()}, seed)
    if not trainable:
        raise MossError(f"stage {stage.name}: trains nothing, expected patterns or adapters")
    return trainable, frozen


def join_params(
    trainable: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], stage: Stage | None = None, dtype: Any = None
) -> dict[str, Any]:
    """Nested parameters of the whole model, as before `split_params`; adapters are merged into their kernels.

    Args:
        stage: needed when there are adapters.
        dtype: of the trained parameters in the result; None: float32, and of a kernel with adapters its own.
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
            raise MossError(f"parameters with adapters ({PREFIX}*): the stage that made them is needed to merge them")
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
    return {path: adapter_axes(path, axes) if is_adapter(path) else axes[path] for path in trainable}, {
        path: axes[path] for path in frozen
    }


def _split_stack(path: str, value: Any, stage: Stage) -> tuple[Any, Any]:
    """(the layers that train, those below or None)."""
    if stage.last_shared_layers is None or not path.startswith(STACK):
        return value, None
    lower = value.shape[0] - stage.last_shared_layers
    if lower < 0:
        raise MossError(f"stage {stage.name}: {stage.last_shared_layers} shared layers, there are {value.shape[0]}")
    return value[lower:], value[:lower] if lower else None

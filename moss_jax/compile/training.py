"""The training steps of `moss-jax compile`: stage 1, stage 2, SFT and LoRA, with arguments laid out on a mesh."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moss_jax.compile.request import CompileRequest
from moss_jax.sharding import fitting
from moss_jax.speech_lm import MOSS_SPEECH_8B, TINY, SpeechLMConfig
from moss_jax.train.optimizer import OptimizerConfig, make_optimizer
from moss_jax.train.speech_lm import stages
from moss_jax.train.speech_lm.flops import PEAK_FLOPS, step_flops
from moss_jax.train.speech_lm.lora import Lora
from moss_jax.train.speech_lm.stages import Stage, stage_shapes
from moss_jax.train.speech_lm.step import BATCH_AXES, frozen_shardings, make_step, state_shardings
from moss_jax.train.state import TrainState

STAGES = {
    "stage1": stages.STAGE_1,
    "stage2": stages.STAGE_2,
    "sft": stages.SFT,
    "lora": stages.with_lora(stages.SFT, Lora()),
}


def train_step(request: CompileRequest, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step and its arguments as shapes: state, frozen parameters, batch, limit of loss and gradient norm.

    Parameters are bfloat16; attention is splash attention where the sizes allow it.
    """
    config, stage = _model(request)
    optimizer = OptimizerConfig(total_steps=10_000, warmup_steps=100)
    trainable, frozen = stage_shapes(config, stage)

    def new_state(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(optimizer).init(params))

    state = _with_shardings(jax.eval_shape(new_state, trainable), state_shardings(config, stage, optimizer, mesh))
    dtypes = {"loss_weights": jnp.float32}
    shape = (request.batch, request.context, 2)  # [B, T, 2]; a batch field has the first axes of these
    batch = {}
    for name, axes in BATCH_AXES.items():
        field_shape = shape[: len(axes)]
        sharding = fitting(axes, field_shape, mesh)
        batch[name] = jax.ShapeDtypeStruct(field_shape, dtypes.get(name, jnp.int32), sharding=sharding)
    step = make_step(config, stage, optimizer, accumulate=request.accumulate, sources=8, mesh=mesh)
    limit = jax.ShapeDtypeStruct((), jnp.float32)
    return step, (state, _with_shardings(frozen, frozen_shardings(config, stage, mesh)), batch, limit)


def step_estimate(request: CompileRequest, chips: int, family: str) -> dict[str, Any]:
    """FLOP of a step, and the seconds it takes at the request's share of the peak FLOP/s of the chips."""
    config, stage = _model(request)
    tokens = request.batch * request.context
    flops = step_flops(config, stage, tokens, request.context)
    result: dict[str, Any] = {"tokens": tokens, "step_flop": float(f"{flops:.4g}")}
    if family in PEAK_FLOPS:
        seconds = flops / (chips * PEAK_FLOPS[family] * request.mfu)
        result["step_seconds_at_mfu"] = round(seconds, 2)
        result["tokens_per_second_at_mfu"] = round(tokens / seconds)
    return result


def _model(request: CompileRequest) -> tuple[SpeechLMConfig, Stage]:
    size = {"8b": MOSS_SPEECH_8B, "tiny": TINY}[request.size]
    # Splash attention works on blocks of 128: head size and context must be multiples.
    attention = "splash" if size.head_dim % 128 == 0 and request.context % 128 == 0 else "xla"
    return replace(size, attention=attention, remat=request.remat), STAGES[request.function]


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )

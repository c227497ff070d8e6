"""The training steps for `moss-jax compile`: stage 1, stage 2 and SFT, with arguments laid out on a mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from moss_jax.sharding import fitting
from moss_jax.speech_lm import MOSS_SPEECH_8B, TINY
from moss_jax.train.optimizer import OptimizerConfig, make_optimizer
from moss_jax.train.speech_lm import stages
from moss_jax.train.speech_lm.flops import PEAK_FLOPS, step_flops
from moss_jax.train.speech_lm.lora import Lora
from moss_jax.train.speech_lm.stages import stage_shapes
from moss_jax.train.speech_lm.step import BATCH_AXES, frozen_shardings, make_step, state_shardings
from moss_jax.train.state import TrainState

STAGES = {
    "stage1": stages.STAGE_1,
    "stage2": stages.STAGE_2,
    "sft": stages.SFT,
    "lora": stages.with_lora(stages.SFT, Lora()),
}


def train_step(request, mesh):
    """The jitted step and the shapes of (state, frozen, batch, limit); bfloat16, splash attention where it divides."""
    config, stage = _model(request)
    optimizer = OptimizerConfig(total_steps=10_000, warmup_steps=100)
    trainable, frozen = stage_shapes(config, stage)
    opt_state = jax.eval_shape(make_optimizer(optimizer).init, trainable)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, opt_state)
    state = _placed(state, state_shardings(config, stage, optimizer, mesh))
    dtypes = {"loss_weights": jnp.float32}
    shape = request.batch, request.context, 2
    batch = {
        name: jax.ShapeDtypeStruct(
            shape[: len(axes)], dtypes.get(name, jnp.int32), sharding=fitting(axes, shape[: len(axes)], mesh)
        )
        for name, axes in BATCH_AXES.items()
    }
    step = make_step(config, stage, optimizer, accumulate=request.accumulate, sources=8, mesh=mesh)
    limit = jax.ShapeDtypeStruct((), jnp.float32)
    return step, (state, _placed(frozen, frozen_shardings(config, stage, mesh)), batch, limit)


def estimate(request, chips: int, family: str) -> dict:
    """What arithmetic alone says about a step: FLOP, and its seconds at the request's share of the peak."""
    config, stage = _model(request)
    tokens = request.batch * request.context
    flops = step_flops(config, stage, tokens, request.context)
    result = {"tokens": tokens, "step_flop": float(f"{flops:.4g}")}
    if family in PEAK_FLOPS:
        seconds = flops / (chips * PEAK_FLOPS[family] * request.mfu)
        result |= {"step_seconds_at_mfu": round(seconds, 2), "tokens_per_second_at_mfu": round(tokens / seconds)}
    return result


def _model(request):
    size = {"8b": MOSS_SPEECH_8B, "tiny": TINY}[request.size]
    attention = "splash" if size.head_dim % 128 == 0 and request.context % 128 == 0 else "xla"
    return replace(size, attention=attention, remat=request.remat), STAGES[request.function]


def _placed(shapes, shardings):
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)

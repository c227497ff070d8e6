"""The flow's loss: conditional flow matching under random prompts, chunk masks and classifier-free dropout.

Between noise z and a mel x1 lie the states y_t = (1 - (1 - sigma) t) z + t x1; the estimator, given y_t, t and the
conditions, is to say the velocity x1 - (1 - sigma) z. Source: `ConditionalCFM.compute_loss` and
`CausalMaskedDiffWithXvec.forward` of the released code, which trains one set of weights for each chunk size; here every
item draws its own, so that one set serves offline and streaming.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.errors import MossError
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.flow.sampler import as_velocity

LAST_BIAS = "estimator/final_out/bias"
LAST_KERNEL = "estimator/final_out/kernel"
LEAST_LEFT = 0.15  # of the time: an estimator that says the mel is not asked for the velocity nearer to the end


@dataclass(frozen=True)
class FlowObjective:
    """What the flow learns from; the defaults are the released ones, but for `chunks`."""

    drop: float = 0.2  # share of items that lose all conditions, for classifier-free guidance
    prompt: float = 0.5  # share of items that are given the beginning of their own mel as a prompt
    longest_prompt: float = 0.3  # of an item
    chunks: tuple[int, ...] = (0, 5, 25)  # codes; an item's static chunk is drawn from these. 0: no chunk mask
    sigma: float = 1e-6  # of the noise that is left at t = 1
    prior: float = 0.0  # weight of the encoder's own mel, its mean square error (Matcha-TTS's prior loss); released: 0

    def __post_init__(self):
        for name in ("drop", "prompt", "longest_prompt", "sigma"):
            if not 0 <= getattr(self, name) < 1:
                raise MossError(f"objective: {name} is {getattr(self, name)}, expected 0 or more and below 1")
        if self.prior < 0:
            raise MossError(f"objective: prior is {self.prior}, expected 0 or more")
        if not self.chunks or min(self.chunks) < 0:
            raise MossError(f"objective: chunks are {self.chunks}, expected at least one, of 0 codes or more")


def draw(key: jax.Array, objective: FlowObjective, config: FlowConfig, count: jax.Array, codes: int) -> dict[str, Any]:
    """Everything random of one batch, for items of `count` int32 [B] of the `codes` codes.

    Returns:
        t float32 [B] in 0..1, denser towards 0 (cosine schedule); noise float32 [B, T, M]; keep bool [B]: the
        conditions stay; prompt int32 [B] mel frames; chunk int32 [B] codes, as many as there are where there is none.
    """
    batch = count.shape[0]
    frames = codes * config.frames_per_code
    keys = jax.random.split(key, 6)
    most = (objective.longest_prompt * count * config.frames_per_code).astype(jnp.int32)  # frames
    prompt = jnp.floor(jax.random.uniform(keys[0], (batch,)) * (most + 1)).astype(jnp.int32)
    chunks = jnp.asarray([chunk or codes for chunk in objective.chunks], jnp.int32)
    return {
        "t": 1 - jnp.cos(jax.random.uniform(keys[1], (batch,)) * jnp.pi / 2),
        "noise": jax.random.normal(keys[2], (batch, frames, config.mel_bins)),
        "keep": jax.random.uniform(keys[3], (batch,)) >= objective.drop,
        "prompt": jnp.where(jax.random.uniform(keys[4], (batch,)) < objective.prompt, jnp.minimum(prompt, most), 0),
        "chunk": chunks[jax.random.randint(keys[5], (batch,), 0, len(objective.chunks))],
    }


def velocity(
    params: Any,
    config: FlowConfig,
    batch: Mapping[str, jax.Array],
    drawn: Mapping[str, Any],
    sigma: float,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The velocity that the model says and the one that is right, what its encoder makes of the codes, and the valid
    frames.

    Args:
        params: of `FlowModel`, nested, in `dtype`.
        batch: codes int32 [B, N], count int32 [B], mel float32 [B, T, M] (natural log), embedding float32 [B, E].
        drawn: see `draw`.

    Returns:
        (said, right, encoded, float32 [B, T, M] each, valid bool [B, T]).
    """
    model = partial(FlowModel(config).apply, {"params": params})
    codes = batch["codes"]
    count = batch["count"]
    keep = drawn["keep"]
    rows = codes.shape[1]
    size = config.frames_per_code
    valid = jnp.arange(rows) < count[:, None]
    frame_valid = jnp.repeat(valid, size, 1)
    target = config.normalized(batch["mel"])
    t = drawn["t"][:, None, None]
    noise = drawn["noise"]
    y = (1 - (1 - sigma) * t) * noise + t * target
    right = target - (1 - sigma) * noise

    ahead = jnp.zeros((codes.shape[0], config.lookahead), codes.dtype)
    x = model(jnp.concatenate([codes, ahead], 1), count, method="embed").astype(dtype)
    encoded, _ = model(x, valid, drawn["chunk"], method="encode")
    speaker = model(batch["embedding"].astype(dtype), method="speaker_projection")
    prompt = jnp.where((jnp.arange(rows * size) < drawn["prompt"][:, None])[..., None], target, 0)
    time = jax.tree.map(lambda x: x.astype(dtype), model(drawn["t"], method="time_embedding"))
    mu, speaker, prompt = (
        jnp.where(keep.reshape(-1, *(1,) * (part.ndim - 1)), part, 0).astype(dtype)
        for part in (encoded, speaker, prompt)
    )
    chunk = drawn["chunk"] * size
    said, _ = model(y.astype(dtype), mu, speaker, prompt, time, frame_valid, chunk, method="velocity")
    said = as_velocity(config, said.astype(jnp.float32), y, mu.astype(jnp.float32), t, LEAST_LEFT)
    if config.predicts == "mel":
        right = as_velocity(config, target, y, jnp.zeros_like(y), t, LEAST_LEFT)
    return said, right, encoded.astype(jnp.float32), frame_valid


def squared_error(said: jax.Array, right: jax.Array, valid: jax.Array) -> jax.Array:
    """Of each item the sum over valid frames of the mean square over mel bins, float32 [B]."""
    return jnp.where(valid[..., None], jnp.square(said - right), 0).sum((1, 2)) / said.shape[-1]


def centred(params: Mapping[str, jax.Array], config: FlowConfig, mel_mean: np.ndarray) -> dict[str, jax.Array]:
    """New weights (flat) that begin by saying the mean of the mel, float [M], wherever they are.

    Without it the first gradients are those of a mel that lies at -6 and not at 0: this, and no warm-up, is what makes
    a flow explode from scratch.
    """
    mean = jnp.asarray(config.normalized(np.asarray(mel_mean)), jnp.float32)
    said = LAST_BIAS if config.predicts == "velocity" else "mu/bias"
    return {**params, LAST_KERNEL: jnp.zeros_like(params[LAST_KERNEL]), said: mean}

"""The loss of the flow: conditional flow matching with random prompts, chunk masks and classifier-free dropout.

Between noise z and a mel x1 are the states y_t = (1 - (1 - sigma) t) z + t x1; from y_t, t and the conditions the
estimator predicts the velocity x1 - (1 - sigma) z. Source: `ConditionalCFM.compute_loss` and
`CausalMaskedDiffWithXvec.forward` of the released code, which trains one set of weights for each chunk size; here a
chunk size is drawn for every item, so that one set works offline and streaming.
"""

from collections.abc import Callable, Mapping
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
# Of the time until t = 1: an estimator that predicts the mel is trained as if at least this much were left, because its
# velocity is (mel - y) / time left, which would have a huge error near the end.
MIN_TIME_LEFT = 0.15


@dataclass(frozen=True)
class FlowObjective:
    """How the flow is trained; the defaults are those of the released code, except for `chunks`."""

    drop: float = 0.2  # share of items that lose all conditions, for classifier-free guidance
    prompt: float = 0.5  # share of items that receive the beginning of their own mel as a prompt
    longest_prompt: float = 0.3  # as a share of the item
    chunks: tuple[int, ...] = (0, 5, 25)  # in codes; the chunk size of an item is drawn from these. 0: no chunk mask
    sigma: float = 1e-6  # of the noise that remains at t = 1
    prior: float = 0.0  # weight of the square error of the encoder's own mel (prior loss of Matcha-TTS); released: 0

    def __post_init__(self) -> None:
        for name in ("drop", "prompt", "longest_prompt", "sigma"):
            if not 0 <= getattr(self, name) < 1:
                raise MossError(f"objective: {name} is {getattr(self, name)}, expected 0 or more and below 1")
        if self.prior < 0:
            raise MossError(f"objective: prior is {self.prior}, expected 0 or more")
        if not self.chunks or min(self.chunks) < 0:
            raise MossError(f"objective: chunks are {self.chunks}, expected at least one, of 0 codes or more")


def draw(key: jax.Array, objective: FlowObjective, config: FlowConfig, count: jax.Array, codes: int) -> dict[str, Any]:
    """Draws everything random of one batch, for items of `count` int32 [B] of the `codes` codes.

    Returns:
        t: float32 [B] in 0..1, denser towards 0 (cosine schedule).
        noise: float32 [B, T, M].
        keep: bool [B], whether the conditions are kept.
        prompt: int32 [B], mel frames.
        chunk: int32 [B], codes; `codes` where there is no chunk mask.
    """
    batch = count.shape[0]
    frames = codes * config.frames_per_code
    keys = jax.random.split(key, 6)
    longest = (objective.longest_prompt * count * config.frames_per_code).astype(jnp.int32)  # frames
    prompt = jnp.floor(jax.random.uniform(keys[0], (batch,)) * (longest + 1)).astype(jnp.int32)
    chunks = jnp.asarray([chunk or codes for chunk in objective.chunks], jnp.int32)
    return {
        "t": 1 - jnp.cos(jax.random.uniform(keys[1], (batch,)) * jnp.pi / 2),
        "noise": jax.random.normal(keys[2], (batch, frames, config.mel_bins)),
        "keep": jax.random.uniform(keys[3], (batch,)) >= objective.drop,
        "prompt": jnp.where(jax.random.uniform(keys[4], (batch,)) < objective.prompt, jnp.minimum(prompt, longest), 0),
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
    """The predicted and the target velocity, the encoder's mel, and the valid frames.

    Args:
        params: of `FlowModel`, nested, in `dtype`.
        batch: codes int32 [B, N], count int32 [B], mel float32 [B, T, M] (natural log), embedding float32 [B, E].
        drawn: see `draw`.

    Returns:
        (predicted, target, encoded, float32 [B, T, M] each, valid bool [B, T])
    """
    apply: Callable[..., Any] = FlowModel(config).apply
    model = partial(apply, {"params": params})
    codes = batch["codes"]
    count = batch["count"]
    keep = drawn["keep"]
    length = codes.shape[1]
    size = config.frames_per_code
    valid = jnp.arange(length)[None] < count[:, None]
    frame_valid = jnp.repeat(valid, size, 1)
    mel = config.normalized(batch["mel"])
    t = drawn["t"][:, None, None]
    noise = drawn["noise"]
    y = (1 - (1 - sigma) * t) * noise + t * mel
    target = mel - (1 - sigma) * noise

    ahead = jnp.zeros((codes.shape[0], config.lookahead), codes.dtype)
    x = model(jnp.concatenate([codes, ahead], 1), count, method="embed").astype(dtype)
    encoded, _ = model(x, valid, drawn["chunk"], method="encode")
    speaker = model(batch["embedding"].astype(dtype), method="speaker_projection")
    prompt = jnp.where((jnp.arange(length * size)[None] < drawn["prompt"][:, None])[..., None], mel, 0)
    time = jax.tree.map(lambda x: x.astype(dtype), model(drawn["t"], method="time_embedding"))
    mu, speaker, prompt = (
        jnp.where(keep.reshape(-1, *(1,) * (part.ndim - 1)), part, 0).astype(dtype)
        for part in (encoded, speaker, prompt)
    )
    chunk = drawn["chunk"] * size
    output, _ = model(y.astype(dtype), mu, speaker, prompt, time, frame_valid, chunk, method="velocity")
    predicted = as_velocity(config, output.astype(jnp.float32), y, mu.astype(jnp.float32), t, MIN_TIME_LEFT)
    if config.predicts == "mel":
        target = as_velocity(config, mel, y, jnp.zeros_like(y), t, MIN_TIME_LEFT)
    return predicted, target, encoded.astype(jnp.float32), frame_valid


def squared_error(predicted: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """The mean square over mel bins, summed over the valid frames of each item, float32 [B]."""
    return jnp.where(valid[..., None], jnp.square(predicted - target), 0).sum((1, 2)) / predicted.shape[-1]


def centred(params: Mapping[str, jax.Array], config: FlowConfig, mel_mean: np.ndarray) -> dict[str, jax.Array]:
    """Changes new weights (flat) so that their initial prediction is the mean of the mel, float [M], at every frame.

    Otherwise the first gradients are those of a mel around -6 instead of 0, and training from scratch diverges.
    """
    mean = jnp.asarray(config.normalized(np.asarray(mel_mean)), jnp.float32)
    bias = LAST_BIAS if config.predicts == "velocity" else "mu/bias"
    return {**params, LAST_KERNEL: jnp.zeros_like(params[LAST_KERNEL]), bias: mean}

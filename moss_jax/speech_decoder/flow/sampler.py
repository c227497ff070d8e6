"""Codes and a voice -> mel, a whole utterance at once: Euler steps with guidance from fixed noise.

Source: `CausalMaskedDiffWithXvec.inference` and `CausalConditionalCFM` of the released code.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.errors import MossError
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.flow.noise import noise
from moss_jax.speech_decoder.voice import Voice


def times(config: FlowConfig) -> np.ndarray:
    """The times of the Euler steps and the end, float32 [steps + 1], denser towards 0 (cosine schedule)."""
    return (1 - np.cos(np.pi / 2 * np.arange(config.euler_steps + 1) / config.euler_steps)).astype(np.float32)


def guided(config: FlowConfig, x: jax.Array) -> jax.Array:
    """An input of the conditional rows [B, ...], with guidance followed by that of the unconditional rows: zeros."""
    return jnp.concatenate([x, jnp.zeros_like(x)]) if config.rows == 2 else x


def repeated(config: FlowConfig, x: jax.Array) -> jax.Array:
    """[B, ...] repeated for all rows of the estimator, [config.rows * B, ...]."""
    return jnp.concatenate([x] * config.rows)


def as_velocity(
    config: FlowConfig,
    prediction: jax.Array,
    x: jax.Array,
    mu: jax.Array,
    t: jax.Array,
    min_time_left: float = 0.0,
) -> jax.Array:
    """The velocity in state x at time t, [B, T, M], from the estimator's prediction.

    Args:
        mu: the encoder's projection.
        min_time_left: lower bound of 1 - t, where the estimator predicts the mel.
    """
    if config.predicts == "velocity":
        return prediction
    return (mu + prediction - x) / jnp.maximum(1 - t, min_time_left)


Velocity = Callable[..., tuple[jax.Array, Any]]


def euler(
    config: FlowConfig,
    model: Callable[..., Any],
    x: jax.Array,
    mu: jax.Array,
    speaker: jax.Array,
    prompt: jax.Array,
    estimate: Velocity,
    inputs: Any = None,
) -> tuple[jax.Array, Any]:
    """Integrates from noise x to mel, with classifier-free guidance if `config.guidance` is not 0.

    Args:
        model: bound `FlowModel.apply`, called with `method=`.
        x, mu, prompt: float32 [B, T, M]; speaker: float32 [B, M].
        estimate: (x, mu, speaker, prompt, time, step, inputs of the step) -> (the estimator's prediction for
            config.rows * B rows, a pytree to collect).
        inputs: a pytree with the steps on axis 0, or None.

    Returns:
        (the states before each step and after the last one, float32 [steps + 1, B, T, M]; the collected pytrees,
        stacked)
    """
    schedule = times(config)
    embedded = model(jnp.asarray(schedule[:-1]), method="time_embedding")
    biases = {"down": embedded["down"], "mid": embedded["mid"].transpose(1, 0, 2), "up": embedded["up"]}
    mu, speaker, prompt = (guided(config, part) for part in (mu, speaker, prompt))

    def step(x: jax.Array, step_inputs: tuple[Any, ...]) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        index, t, delta, bias, own_inputs = step_inputs
        time = {"down": bias["down"][None], "mid": bias["mid"][:, None], "up": bias["up"][None]}
        states = repeated(config, x)
        prediction, collected = estimate(states, mu, speaker, prompt, time, index, own_inputs)
        v = as_velocity(config, prediction, states, mu, t)
        if config.rows == 2:
            v, unconditional = jnp.split(v, 2)
            v = (1 + config.guidance) * v - config.guidance * unconditional
        return x + delta * v, (x, collected)

    steps = (jnp.arange(config.euler_steps), jnp.asarray(schedule[:-1]), jnp.asarray(np.diff(schedule)), biases, inputs)
    last, (states, collected) = jax.lax.scan(step, x, steps)
    return jnp.concatenate([states, last[None]]), collected


def flow(
    params: Any,
    config: FlowConfig,
    noise: jax.Array,
    codes: jax.Array,
    count: jax.Array,
    prompt: jax.Array,
    embedding: jax.Array,
    streaming: bool = False,
    finalize: bool = True,
) -> jax.Array:
    """The functional core: all states from noise to mel for a padded batch. An item gets the result that it gets alone.

    Args:
        noise: float32 [1, >= 4T, M].
        codes: int32 [B, T], of prompt and speech.
        count: int32 [B], how many of them exist.
        prompt: float32 [B, 4T, M], the prompt's normalised mel, zero elsewhere.
        embedding: float32 [B, E].
        streaming: attention with the static chunk mask.
        finalize: False: the last `lookahead` codes are look-ahead only.

    Returns:
        float32 [steps + 1, B, 4T, M]. The last state is the mel, whose first 4 * count frames are valid
        (4 * (count - lookahead) if not finalize).
    """
    model = partial(FlowModel(config).apply, {"params": params})
    rows = codes.shape[1]
    frames = codes.shape[1] * config.frames_per_code
    valid = jnp.arange(rows)[None] < (count if finalize else count - config.lookahead)[:, None]
    chunk = config.chunk if streaming else None
    ahead = jnp.zeros((codes.shape[0], config.lookahead), codes.dtype)
    x = model(jnp.concatenate([codes, ahead], 1), count, method="embed")
    mu, _ = model(x, valid, chunk, method="encode")
    frame_valid = jnp.repeat(valid, config.frames_per_code, 1)
    every_row = repeated(config, frame_valid)

    def estimate(
        x: jax.Array, mu: jax.Array, speaker: jax.Array, prompt: jax.Array, time: Any, step: jax.Array, inputs: None
    ) -> tuple[jax.Array, None]:
        chunk_frames = chunk and config.chunk_frames
        prediction, _ = model(x, mu, speaker, prompt, time, every_row, chunk_frames, method="velocity")
        return prediction, None

    x = jnp.broadcast_to(noise[:, :frames], (codes.shape[0], frames, config.mel_bins))
    speaker: Any = model(embedding, method="speaker_projection")
    states, _ = euler(config, model, x, mu, speaker, prompt, estimate)
    return states


def bucket(length: int, max_length: int) -> int:
    """The static length for `length` rows: the next multiple of a 16th of the power of two below it, and of 8."""
    step: int = max(8, 2 ** ((max(length, 2) - 1).bit_length() - 5))
    return min(-(-length // step) * step, max_length)


def check_codes(config: FlowConfig, codes: np.ndarray, prompt_codes: int) -> np.ndarray:
    """The codes of one utterance as int32 [N].

    Raises:
        MossError: no codes, codes out of range, or more of them than the flow supports.
    """
    codes = np.asarray(codes)
    if codes.ndim != 1 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise MossError(f"speech codes: {codes.dtype} {list(codes.shape)}, expected at least one integer in a row")
    check_range(config, codes)
    check_length(config, prompt_codes, codes.size)
    return codes.astype(np.int32)


def check_range(config: FlowConfig, codes: np.ndarray) -> None:
    """Raises MossError when a code is not one of the speech tokenizer's."""
    wrong = np.flatnonzero((codes < 0) | (codes >= config.codebook_size))
    if wrong.size:
        raise MossError(
            f"speech codes: code {int(codes[wrong[0]])} at position {int(wrong[0])} "
            f"is out of range, expected 0..{config.codebook_size - 1}"
        )


def check_length(config: FlowConfig, prompt_codes: int, codes: int) -> None:
    """Raises MossError when prompt and speech together are longer than the noise."""
    if prompt_codes + codes > config.max_codes:
        raise MossError(
            f"speech codes: {codes} codes after a prompt of {prompt_codes} are too long, expected at most "
            f"{config.max_codes} together ({config.noise_frames} mel frames of noise)"
        )


@lru_cache(maxsize=16)
def _compiled(config: FlowConfig, streaming: bool, finalize: bool) -> Any:
    """`flow`, compiled."""

    def run(
        params: Any,
        noise: jax.Array,
        codes: jax.Array,
        count: jax.Array,
        prompt: jax.Array,
        embedding: jax.Array,
    ) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return flow(params, config, noise, codes, count, prompt, embedding, streaming, finalize)

    return jax.jit(run)


def decode(
    params: Any,
    config: FlowConfig,
    codes: np.ndarray,
    voice: Voice,
    *,
    streaming: bool = False,
    finalize: bool = True,
    buffer: np.ndarray | None = None,
    states: bool = False,
) -> np.ndarray:
    """Codes int [N] in a voice -> mel float32 [1, 4N, M] (natural log, 50 frames a second), without the prompt.

    Lengths are padded to a few static ones (`bucket`), so that other lengths of the same bucket compile nothing. The
    padding does not change the result.

    Args:
        params: nested parameters of `FlowModel`.
        streaming: attention with the static chunk mask, as in the streams of the reference.
        finalize: False: the last `lookahead` codes are look-ahead only, and 4 * (N - lookahead) frames are returned.
        buffer: noise float32 [1, T, M] instead of the fixed one.
        states: return the states from noise to normalised mel with the prompt, float32 [steps + 1, 1, 4(P + N), M].

    Raises:
        MossError: no codes, codes out of range, fewer than the look-ahead, or too many together with the prompt.
    """
    prompt_codes = np.asarray(voice.codes, np.int32)
    codes = check_codes(config, codes, prompt_codes.size)
    if not finalize and codes.size < config.lookahead:
        raise MossError(f"speech codes: {codes.size} codes, expected at least the look-ahead of {config.lookahead}")
    buffer = noise(config.noise_frames, config.mel_bins) if buffer is None else buffer
    frames = config.frames_per_code
    count = prompt_codes.size + codes.size
    padded = bucket(count, buffer.shape[1] // frames)
    ids = np.zeros((1, padded), np.int32)
    ids[0, :count] = np.concatenate([prompt_codes, codes])
    prompt = np.zeros((1, padded * frames, config.mel_bins), np.float32)
    prompt[0, : prompt_codes.size * frames] = config.normalized(voice.mel)
    embedding = np.asarray(voice.embedding, np.float32)[None]
    buffer = buffer[:, : padded * frames]
    run = _compiled(config, streaming, finalize)
    result = np.asarray(run(params, buffer, ids, np.array([count], np.int32), prompt, embedding))
    end = (count if finalize else count - config.lookahead) * frames
    if states:
        return result[:, :, :end]
    return config.denormalized(result[-1, :, prompt_codes.size * frames : end])

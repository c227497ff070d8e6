"""The vocoder over a mel that arrives in pieces: a pure function of the state, with one compiled shape for all pieces.

A piece is vocoded together with the last frames before it. The convolutions look ahead, so the samples of the last
`overlap` frames of a piece are held back until the next one arrives. Of these, the last `f0_reach` frames are never
used, because their F0 is not final. Over the frames before them the two renderings are cross-faded with weights that
sum to one; both have the same source there, because the state has its phase and its noise depends on the absolute
frame.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moss_jax.errors import MossError
from moss_jax.speech_decoder.vocoder.config import VocoderConfig
from moss_jax.speech_decoder.vocoder.model import HiFT, sine_noise


class VocoderState(struct.PyTreeNode):
    """The state of one stream, with the last `context` frames, of which min(frames, context) exist."""

    mel: jax.Array  # float32 [context, M], the last frames, from row 0 on
    f0: jax.Array  # float32 [context], Hz, of the same frames
    phase: jax.Array  # uint32 [harmonics], at the centre of the frame before them
    speech: jax.Array  # float32 [fade * hop], the rendering that is faded into the next one
    frames: jax.Array  # int32, mel frames so far


def fade_frames(config: VocoderConfig, overlap: int) -> int:
    """Frames over which two renderings are cross-faded. Raises MossError when the overlap is too short."""
    fade = overlap - config.f0_reach
    if fade < 1:
        raise MossError(f"speech decoder config: mel_overlap is {overlap} frames, expected more than {config.f0_reach}")
    return fade


def init_state(config: VocoderConfig, overlap: int, context: int) -> VocoderState:
    """The state before the first piece.

    Args:
        overlap: frames held back.
        context: frames that are vocoded again with the next piece. At least `overlap`, and twice `f0_reach`, so that
            the F0 of all frames that are used is final.
    """
    min_context = max(overlap, 2 * config.f0_reach)
    if context < min_context:
        raise MossError(f"speech decoder config: mel_context is {context} frames, expected at least {min_context}")
    return VocoderState(
        mel=jnp.zeros((context, config.mel_bins)),
        f0=jnp.zeros(context),
        phase=jnp.zeros(config.harmonics, jnp.uint32),
        speech=jnp.zeros(fade_frames(config, overlap) * config.hop),
        frames=jnp.zeros((), jnp.int32),
    )


def emitted_frames(frames: int, overlap: int, last: bool) -> int:
    """The number of frames whose samples have been returned when `frames` have been pushed."""
    return frames if last else max(frames - overlap, 0)


def step(
    params: Any,
    config: VocoderConfig,
    overlap: int,
    state: VocoderState,
    mel: jax.Array,
    count: jax.Array,
    last: jax.Array,
    seed: jax.Array,
) -> tuple[VocoderState, jax.Array]:
    """Vocodes the next piece.

    Args:
        params: nested parameters of HiFT with folded weight norm.
        overlap: frames held back at the end of every piece but the last.
        mel: float32 [T, M].
        count: int32, how many of the T frames exist.
        last: bool, whether this is the last piece.
        seed: uint32, of the noise.

    Returns:
        (the new state, samples float32 [(overlap + T) * hop]). Valid are the first ones, as many as the difference of
        the `emitted_frames` before and after the piece.
    """
    model = HiFT(config)
    hop = config.hop
    context = state.mel.shape[0]
    size = state.mel.shape[0] + mel.shape[0]
    kept = jnp.minimum(state.frames, context)
    start = state.frames - kept  # of the window in the stream
    end = kept + count  # of the frames that exist in the window
    window = jnp.pad(state.mel, ((0, mel.shape[0]), (0, 0)))
    window = jax.lax.dynamic_update_slice(window, mel, (kept, 0))[None]
    lengths = end[None]

    def apply(*inputs: Any, method: str) -> Any:
        return model.apply({"params": params}, *inputs, method=method)

    with jax.named_scope("f0"):
        f0 = apply(window, lengths, method="f0")
        final = jnp.arange(size) < kept - config.f0_reach
        f0 = jnp.where(final, jnp.pad(state.f0, (0, mel.shape[0])), f0[0])[None]
    noise = sine_noise(config, jax.random.key(seed), start, size)[None]
    source, phases = apply(f0, noise, lengths, state.phase[None], (start > 0)[None], method="source")
    wave = apply(window, source, lengths, method="decode")[0]  # [size * hop]

    before = jnp.maximum(state.frames - overlap, 0)
    after = jnp.where(last, state.frames + count, jnp.maximum(state.frames + count - overlap, 0))
    samples = jax.lax.dynamic_slice(wave, ((before - start) * hop,), ((overlap + mel.shape[0]) * hop,))
    fade = state.speech.shape[0]
    weight = jnp.asarray(np.sin(np.pi / 2 * (np.arange(fade) + 0.5) / fade) ** 2, wave.dtype)
    faded = weight * samples[:fade] + (1 - weight) * state.speech
    samples = samples.at[:fade].set(jnp.where(before > 0, faded, samples[:fade]))

    keep_from = jnp.maximum(end - context, 0)
    carried = jnp.concatenate([state.phase[None], phases[0]])
    new_state = VocoderState(
        mel=jax.lax.dynamic_slice(window[0], (keep_from, 0), state.mel.shape),
        f0=jax.lax.dynamic_slice(f0[0], (keep_from,), state.f0.shape),
        phase=carried[keep_from],
        speech=jax.lax.dynamic_slice(samples, ((after - before) * hop,), (fade,)),
        frames=state.frames + count,
    )
    return new_state, samples

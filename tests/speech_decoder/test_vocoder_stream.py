"""A mel vocoded in pieces, compared with the same mel vocoded at once: no clicks, the same source, any partition."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.errors import MossError
from moss_jax.nn.tree import unflatten
from moss_jax.speech_decoder.decoder import vocode
from moss_jax.speech_decoder.vocoder.config import TINY
from moss_jax.speech_decoder.vocoder.model import fold_weight_norm
from moss_jax.speech_decoder.vocoder.stream import emitted_frames, init_state, step
from tests.compilations import compilations
from tests.speech_decoder.test_vocoder import random_params

# With the reach of the released network: an F0 net of five layers, kernels of 11 with dilation 5.
WIDE = replace(
    TINY, f0_layers=5, resblock_widths=(3, 11), resblock_dilations=((1, 3), (1, 5)), source_resblock_widths=(7, 7, 11)
)
OVERLAP = 8
CONTEXT = 12
ROWS = 20
HOP = 480


@pytest.fixture(scope="module")
def models():
    config = replace(WIDE, weight_norm=False)
    params = random_params(WIDE)
    for path in params:
        if path.endswith("/g"):
            params[path] *= 0.7 if "resblocks" in path else 0.4 if path.startswith("conv_post") else 1
    params = jax.tree.map(jnp.asarray, unflatten(fold_weight_norm(params)))
    return config, params, jax.jit(partial(step, params, config, OVERLAP))


def speech_like(frames):
    """A log-mel with formants that move, pauses and onsets."""
    rng = np.random.default_rng(0)
    time = np.arange(frames)[:, None]
    bins = np.arange(80)
    mel = -6 + 4 * np.exp(-(((bins - 25 - 12 * np.sin(time / 9)) / 6) ** 2)) + 2 * np.cos(bins / 3 + time / 14)
    mel[frames // 3 : frames // 3 + 12] = -11
    return (mel + 0.3 * rng.normal(size=mel.shape)).astype(np.float32)


def pieces(models, mel, sizes, seed=4):
    config, _, run = models
    state = init_state(config, OVERLAP, CONTEXT)
    waves = []
    frames = 0
    for size in sizes:
        last = frames + size == len(mel)
        padded = np.pad(mel[frames : frames + size], ((0, ROWS - size), (0, 0)))
        state, wave = run(state, padded, size, last, seed)
        before = emitted_frames(frames, OVERLAP, False)
        frames += size
        waves.append(np.asarray(wave)[: (emitted_frames(frames, OVERLAP, last) - before) * HOP])
    return waves


def test_no_clicks_and_close_to_the_whole(models):
    mel = speech_like(176)
    config, params, _ = models
    pieces(models, mel[:16], [16])
    with compilations() as compiled:
        waves = pieces(models, mel, [16] + [20] * 8)
    ours = np.concatenate(waves)
    whole = vocode(params, config, mel, 4)
    assert ours.shape == whole.shape and compiled == []
    error = ours - whole
    ratio = 10 * np.log10(np.square(whole).mean() / np.square(error).mean())
    assert ratio > 40, f"{ratio:.1f} dB"  # 49; with a source that restarts in every piece it is 15
    # Whether a border is heard: the jump that is there and not in the whole wave, beside the steps of the wave itself.
    borders = np.cumsum([len(wave) for wave in waves])[:-1]
    jumps = np.abs(np.diff(error))
    typical = np.median(np.abs(np.diff(ours)))
    fade_ends = borders[:-1] + (OVERLAP - config.f0_reach) * HOP
    assert jumps[borders - 1].max() < 0.1 * typical  # 0.02; with a restarting source 0.5
    assert jumps[fade_ends - 1].max() < 0.1 * typical


@pytest.mark.parametrize("sizes", [[4], [1], [4, 4, 4, 20], [9, 1, 20, 3], [20, 8], [20, 4]])
def test_any_partition_has_every_sample(models, sizes):
    mel = speech_like(176)[: sum(sizes)]
    config, params, _ = models
    waves = pieces(models, mel, sizes)
    assert sum(map(len, waves)) == len(mel) * HOP
    if len(sizes) == 1:
        np.testing.assert_allclose(waves[0], vocode(params, config, mel, 4), atol=2e-5)


def test_overlap_and_context_must_cover_the_reach_of_the_f0():
    with pytest.raises(MossError, match="mel_overlap is 5"):
        init_state(WIDE, 5, 12)
    with pytest.raises(MossError, match="mel_context is 9"):
        init_state(WIDE, 8, 9)

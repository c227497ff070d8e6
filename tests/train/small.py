"""A small model and packed batches of it, for the tests of training."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.speech_lm import TINY, SpeechLMConfig, model_shapes

SMALL = replace(TINY, num_shared_layers=2, num_modality_layers=1)


def random_params(config: SpeechLMConfig = SMALL, seed: int = 0, dtype=np.float32) -> dict[str, jax.Array]:
    """Flat random parameters, large enough that every parameter affects the logits."""
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(rng.normal(path.endswith("scale"), 0.15, leaf.shape), dtype)
        for path, leaf in model_shapes(config).items()
    }


def random_batch(config: SpeechLMConfig = SMALL, rows: int = 8, length: int = 16, seed: int = 0, sources: int = 2):
    """Packed rows of two segments and some padding, with text and audio mixed, and losses on some positions."""
    rng = np.random.default_rng(seed)
    shape = rows, length
    spoken = rng.random(shape) < 0.5 if config.audio_vocab_size else np.zeros(shape, bool)
    text = np.where(spoken, config.modality_pad_id, rng.integers(0, min(287, config.text_vocab_size), shape))
    audio = np.where(spoken, rng.integers(0, config.eosp_id, shape), config.audio_pad_id)
    cut = rng.integers(2, length // 2, rows)
    end = rng.integers(length // 2 + 1, length + 1, rows)
    at = np.arange(length)[None].repeat(rows, 0)
    segments = np.where(at < cut[:, None], 1, np.where(at < end[:, None], 2, 0))
    positions = np.where(segments == 2, at - cut[:, None], np.where(segments == 1, at, 0))
    counts = (positions > 0) & (segments > 0) & (rng.random(shape) < 0.8)
    weights = np.stack([counts & ~spoken, counts & spoken], -1).astype(np.float32)
    source = np.where(segments > 0, rng.integers(0, sources, (rows, 1)), -1)
    return {
        "grid": jnp.asarray(np.stack([text, audio], -1), jnp.int32),
        "positions": jnp.asarray(positions, jnp.int32),
        "segment_ids": jnp.asarray(segments, jnp.int32),
        "loss_weights": jnp.asarray(weights),
        "source": jnp.asarray(source, jnp.int32),
    }

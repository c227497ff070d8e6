"""The speech tokenizer's encoder against PyTorch at more than a thousand log-mel frames.

`tests/data/long_speech_tokenizer.safetensors` holds the codes and a slice of the states before the quantiser. They were
made once with torch 2.13 on the CPU in float32, by a transcription of the released Whisper-VQ encoder in torch
functions (causal convolutions, pre-norm layers with `scaled_dot_product_attention(is_causal=True)`, average pooling,
nearest code by distance), with `draw_weights(shapes, 42)` under the released names on the input drawn below. In float64
it gives the same codes.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from moss_jax.convert.tables.speech_tokenizer import table
from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import Encoder
from tests.reference_weights import draw_weights

CONFIG = SpeechTokenizerConfig(
    sample_rate=16000,
    n_fft=400,
    hop_length=160,
    num_mel_bins=40,
    d_model=32,
    num_layers=3,
    encoder_attention_heads=4,
    encoder_ffn_dim=64,
    max_source_positions=1500,
    pooling_kernel_size=4,
    quantize_vocab_size=96,
    code_dim=32,
    normalize_codes=False,
    layer_norm_epsilon=1e-5,
)
FRAMES = 1304


@pytest.fixture(scope="module")
def stored():
    return load_file(Path(__file__).parents[1] / "data" / "long_speech_tokenizer.safetensors")


def log_mel():
    return np.random.default_rng(41).standard_normal((1, FRAMES, CONFIG.num_mel_bins)).astype(np.float32)


def weights(shapes):
    """Large positions and a spread codebook make the codes diverse and the choice of each clear."""
    drawn = draw_weights(shapes, 42)
    drawn["encoder.embed_positions.weight"] = 20 * drawn["encoder.embed_positions.weight"]
    drawn["encoder.codebook.weight"] = 5 * drawn["encoder.codebook.weight"]
    return drawn


@pytest.fixture(scope="module")
def params():
    tree = param_shapes(Encoder(CONFIG), jax.ShapeDtypeStruct((1, 8, CONFIG.num_mel_bins), jnp.float32))
    names = table(CONFIG)
    return unflatten(names.to_ours(weights(names.shapes(tree)), tree, "weights"))


def test_states_and_codes(stored, params):
    @jax.jit
    def run(params, frames):
        pooled = Encoder(CONFIG).apply({"params": params}, frames, method="pooled")
        return pooled, Encoder(CONFIG).apply({"params": params}, pooled, method="quantize")

    pooled, codes = run(params, log_mel())
    assert len(np.unique(stored["codes"])) > 20
    np.testing.assert_allclose(pooled[0, ::9, ::3], stored["pooled"], atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(codes[0], stored["codes"])

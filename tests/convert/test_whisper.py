"""A speech tokenizer initialized from a Whisper of transformers has the same logits, part by part."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.convert.whisper import import_whisper
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.speech_tokenizer.encoder import Encoder, init_params
from moss_jax.train.speech_tokenizer.head import Head, init_head
from moss_jax.train.speech_tokenizer.run import Objective
from tests.train.tones import MODEL

CONFIG = replace(MODEL, num_layers=2, code_dim=16, max_source_positions=40)
OBJECTIVE = Objective(head="attention", layers=1, decoder_layers=2, max_units=12, mel_hidden=8)
UNITS = 30


def new_parameters(config=CONFIG):
    head = init_head(Head(config, OBJECTIVE, UNITS), jax.random.key(1))
    return flatten({"encoder": init_params(config, jax.random.key(0)), "head": head})


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """(transformers' model with every parameter random, its folder)"""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    about = transformers.WhisperConfig(
        vocab_size=UNITS,
        num_mel_bins=24,
        d_model=16,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=40,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperForConditionalGeneration(about).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def ours(whisper):
    parameters = new_parameters()
    return unflatten(parameters | import_whisper(whisper[1], CONFIG, parameters, lambda line: None))


@pytest.mark.slow
def test_the_decoder_gives_the_logits_of_whisper(whisper, ours):
    import torch

    random = np.random.default_rng(0)
    memory = random.normal(size=(2, 7, 16)).astype(np.float32)
    units = random.integers(0, UNITS, (2, 9))
    with torch.no_grad():
        expected = whisper[0](decoder_input_ids=torch.tensor(units), encoder_outputs=(torch.tensor(memory),)).logits
    head = Head(CONFIG, OBJECTIVE, UNITS)
    valid = jnp.ones((2, 7), bool)
    result = head.apply({"params": ours["head"]}, jnp.asarray(units), jnp.asarray(memory), valid, method="decode")
    np.testing.assert_allclose(result, expected, atol=2e-5, rtol=1e-4)
    # What is not valid is not attended to.
    longer = np.concatenate([memory, 9 * np.ones((2, 2, 16), np.float32)], 1)
    valid = jnp.arange(9)[None] < jnp.array([[7], [7]])
    again = head.apply({"params": ours["head"]}, jnp.asarray(units), jnp.asarray(longer), valid, method="decode")
    np.testing.assert_allclose(again, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_encoder_is_whispers_with_causal_layers_before_the_quantizer(whisper, ours):
    import torch
    from torch.nn.functional import conv1d, gelu, pad

    random = np.random.default_rng(1)
    frames = random.normal(size=(2, 32, 24)).astype(np.float32)
    encoder = whisper[0].model.encoder
    with torch.no_grad():
        x = torch.tensor(frames).transpose(1, 2)
        x = gelu(conv1d(pad(x, (2, 0)), encoder.conv1.weight, encoder.conv1.bias))
        x = gelu(conv1d(pad(x, (2, 0)), encoder.conv2.weight, encoder.conv2.bias, stride=2))
        x = x.transpose(1, 2) + encoder.embed_positions.weight[:16]
        mask = torch.full((16, 16), -torch.inf).triu(1)[None, None]
        for layer in encoder.layers[:2]:
            x = _first(layer(x, attention_mask=mask))
        pooled = x.reshape(2, 4, 4, 16).mean(2)
        after = encoder.layer_norm(_first(encoder.layers[2](pooled, attention_mask=None)))
    result = Encoder(CONFIG).apply({"params": ours["encoder"]}, jnp.asarray(frames), method="pooled")
    np.testing.assert_allclose(result, pooled, atol=2e-5, rtol=1e-4)
    head = Head(CONFIG, OBJECTIVE, UNITS)
    result = head.apply({"params": ours["head"]}, result, jnp.ones((2, 4), bool), method="memory")
    np.testing.assert_allclose(result, after, atol=3e-5, rtol=1e-4)


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.slow
def test_another_size_is_refused(whisper):
    with pytest.raises(MossError, match="its num_mel_bins is 24, the run's model has 40"):
        import_whisper(whisper[1], replace(CONFIG, num_mel_bins=40), new_parameters(), print)
    one = replace(CONFIG, num_layers=1)  # then two layers stand after the codes
    with pytest.raises(MossError, match="do not fit the model"):
        import_whisper(whisper[1], one, new_parameters(one), print)

"""The encoder against torch, and waves to codes in batches."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dev.parity import check_golden, read_golden
from moss_jax.checkpoint.config_io import read_config, write_config
from moss_jax.convert.tables.speech_tokenizer import config_from_released, table
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.speech_tokenizer import encode as encode_module
from moss_jax.speech_tokenizer.config import MOSS_SPEECH_CODEC, TINY, SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encode import SpeechTokenizer, encode_padded
from moss_jax.speech_tokenizer.encoder import Encoder, encoder_shapes, init_params
from tests.compilations import compilations


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: init_params(TINY, jax.random.key(0)))()


@pytest.fixture(scope="module")
def speech_tokenizer(params):
    return SpeechTokenizer(TINY, params)


def noise(samples, seed=0):
    envelope = np.sin(np.arange(samples) * 0.002) ** 2
    return (np.random.default_rng(seed).normal(0, 0.1, samples) * envelope).astype(np.float32)


def test_names_and_shapes_of_the_release():
    found = table(MOSS_SPEECH_CODEC).shapes(encoder_shapes(MOSS_SPEECH_CODEC))
    expected = {
        "conv1.weight": (1280, 128, 3),
        "conv1.bias": (1280,),
        "conv2.weight": (1280, 1280, 3),
        "conv2.bias": (1280,),
        "codebook.weight": (16384, 1280),
        "embed_positions.weight": (1500, 1280),
        "embed_positions2.weight": (375, 1280),
    }
    for layer in range(16):
        for name in "qkv":
            expected[f"layers.{layer}.self_attn.{name}_proj.weight"] = (1280, 1280)
        expected[f"layers.{layer}.self_attn.out_proj.weight"] = (1280, 1280)
        biases = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "fc2")
        for name in (*biases, "self_attn_layer_norm", "final_layer_norm"):
            expected[f"layers.{layer}.{name}.bias"] = (1280,)
        expected[f"layers.{layer}.self_attn_layer_norm.weight"] = (1280,)
        expected[f"layers.{layer}.final_layer_norm.weight"] = (1280,)
        expected |= {f"layers.{layer}.fc1.weight": (5120, 1280), f"layers.{layer}.fc1.bias": (5120,)}
        expected[f"layers.{layer}.fc2.weight"] = (1280, 5120)
    assert found == {f"encoder.{name}": shape for name, shape in expected.items()}


def test_unused_tensors_are_carried():
    names = table(TINY)
    for name in ("decoder.x", "encoder.ema_count", "encoder.ema_weight", "encoder.layer_norm.bias"):
        assert names.is_carried(name)
    assert names.is_carried("encoder.layers.3.fc1.weight") and names.is_carried("encoder.layers.12.fc1.weight")
    assert not names.is_carried("encoder.layers.2.fc1.weight") and not names.is_carried("encoder.conv3.weight")


def torch_codes(weights, config, frames):
    """Distances to all codes in torch, from the released names: frames [B, T, M] -> [B, T', codes]."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    w = {name.removeprefix("encoder."): torch.tensor(np.array(value)) for name, value in weights.items()}
    x = torch.tensor(np.array(frames)).transpose(1, 2)
    x = functional.pad(x, (0, x.shape[2] % 2))
    for name, stride in (("conv1", 1), ("conv2", 2)):
        x = functional.conv1d(functional.pad(x, (2, 0)), w[f"{name}.weight"], w[f"{name}.bias"], stride)
        x = functional.gelu(x)
    x = x.transpose(1, 2) + w["embed_positions.weight"][: x.shape[2]]
    for i in range(config.num_layers):

        def linear(y, name, i=i):
            return functional.linear(y, w[f"layers.{i}.{name}.weight"], w.get(f"layers.{i}.{name}.bias"))

        def norm(y, name, i=i):
            scale = w[f"layers.{i}.{name}.weight"]
            bias = w[f"layers.{i}.{name}.bias"]
            return functional.layer_norm(y, scale.shape, scale, bias)

        y = norm(x, "self_attn_layer_norm")
        heads = [linear(y, f"self_attn.{name}_proj") for name in "qkv"]
        heads = [h.unflatten(-1, (config.encoder_attention_heads, -1)).transpose(1, 2) for h in heads]
        y = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(y, "self_attn.out_proj")
        x = x + linear(functional.gelu(linear(norm(x, "final_layer_norm"), "fc1")), "fc2")
    x = functional.pad(x, (0, 0, 0, -x.shape[1] % 4))
    pooled = functional.avg_pool1d(x.transpose(1, 2), 4).transpose(1, 2)
    if "project.weight" in w:
        pooled = functional.linear(pooled, w["project.weight"], w["project.bias"])
    h = pooled.double()
    codebook = w["codebook.weight"].double()
    if config.normalize_codes:
        h = functional.normalize(h, dim=-1)
        codebook = functional.normalize(codebook, dim=-1)
    return torch.cdist(h, codebook).numpy()


LONG = replace(TINY, max_source_positions=640)


@pytest.mark.parametrize(
    ("config", "frames"), [(LONG, 1280), (LONG, 613), (replace(LONG, code_dim=6, normalize_codes=True), 13)]
)
def test_codes_are_those_of_torch(config, frames):
    """Up to several hundred positions, so more than one block of queries, and lengths that need padding."""
    params = jax.jit(lambda: init_params(config, jax.random.key(1)))()
    x = np.random.default_rng(frames).normal(size=(2, frames, 128)).astype(np.float32)
    distances = torch_codes(dict(table(config).to_theirs(flatten(params))), config, x)
    codes = np.asarray(jax.jit(Encoder(config).apply)({"params": params}, x))
    assert codes.dtype == np.int32 and codes.shape == distances.shape[:2]
    chosen = np.take_along_axis(distances, codes[..., None], -1)[..., 0]
    assert (chosen - distances.min(-1)).max() < 1e-5


def test_the_first_of_equal_codes_wins(params):
    book = params["codebook"].at[7].set(params["codebook"][3])
    codes = Encoder(TINY).apply({"params": params | {"codebook": book}}, book[None, 7:8], method="quantize")
    assert codes.tolist() == [[3]]


def test_no_code_sees_the_future(params):
    x = np.random.default_rng(0).normal(size=(1, 48, 128)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: Encoder(TINY).apply({"params": params}, x, method="pooled")[0, 2].sum()))(x)
    reach = np.abs(gradient).max((0, 2))
    assert (reach[23:] == 0).all() and (reach[:23] > 0).all()  # strides leave frame 23 to the next code


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.sampled_from([1, 1281, 4999, 19200, 30001]), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_codes_of_a_clip_do_not_depend_on_the_batch(speech_tokenizer, lengths, seed):
    waves = [noise(length, seed + i) for i, length in enumerate(lengths)]
    together = speech_tokenizer.encode(waves)
    for wave, codes in zip(waves, together, strict=True):
        whole, rest = divmod(len(wave), TINY.samples_per_segment)
        assert len(codes) == whole * TINY.codes_per_segment + -(-rest // 1280)
        np.testing.assert_array_equal(codes, speech_tokenizer.encode([wave])[0])


def test_segments_are_independent(speech_tokenizer):
    wave = noise(TINY.samples_per_segment * 2 + 3000)
    pieces = [wave[i : i + TINY.samples_per_segment] for i in range(0, len(wave), TINY.samples_per_segment)]
    np.testing.assert_array_equal(speech_tokenizer.encode([wave])[0], np.concatenate(speech_tokenizer.encode(pieces)))


def test_other_lengths_in_the_same_bucket_compile_nothing(speech_tokenizer):
    speech_tokenizer.encode([noise(11000), noise(10500)])
    with compilations() as compiled:
        speech_tokenizer.encode([noise(12000, 1), noise(15000, 2)])
    assert compiled == []


def test_a_large_batch_is_cut_into_calls(speech_tokenizer, params, monkeypatch):
    calls = []
    monkeypatch.setattr(encode_module, "encode_padded", lambda *a: calls.append(a[2].shape) or encode_padded(*a))
    waves = [noise(700 + 13 * i, i) for i in range(140)]
    codes = SpeechTokenizer(TINY, params, max_seconds=1.5).encode(waves)
    assert max(rows for rows, _ in calls) <= 16 and sum(rows for rows, _ in calls) < 1.4 * len(waves)
    np.testing.assert_array_equal(codes[99], speech_tokenizer.encode([waves[99]])[0])


def test_edge_cases_and_invalid_waves(speech_tokenizer):
    assert [c.shape for c in speech_tokenizer.encode([np.zeros(0, np.float32), np.zeros(1)])] == [(0,), (1,)]
    assert speech_tokenizer.encode([]) == []
    for wave, message in (
        (np.zeros((2, 100)), r"wave 1 is float64 \[2, 100\], expected floats"),
        (np.zeros(100, np.int16), "wave 1 is int16"),
        (np.full(10, np.nan), "wave 1 has NaN"),
    ):
        with pytest.raises(MossError, match=message):
            speech_tokenizer.encode([noise(10), wave])


def test_config():
    assert read_config(SpeechTokenizerConfig, write_config(TINY), "config.json") == TINY
    released = {
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 128,
        "max_source_positions": 1500,
        "pooling_kernel_size": 4,
        "quantize_vocab_size": 16384,
        "quantize_position": 16,
        "pooling_position": 16,
        "activation_function": "gelu",
    }
    assert config_from_released(released, "config.json") == MOSS_SPEECH_CODEC
    assert (MOSS_SPEECH_CODEC.samples_per_segment, MOSS_SPEECH_CODEC.code_rate) == (480000, 12.5)
    for change, message in (
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"pooling_position": 8}, "pooling_position is 8, expected quantize_position, 16"),
        ({"encoder_layers": 4}, "encoder_layers is 4"),
        ({"encoder_attention_heads": 7}, "d_model 1280 is not a multiple of encoder_attention_heads 7"),
    ):
        with pytest.raises(MossError, match=message):
            config_from_released(released | change, "config.json")
    with pytest.raises(MossError, match=r"missing: d_model[^\n]*\n +missing: quantize_position"):
        config_from_released(
            {k: v for k, v in released.items() if k not in ("d_model", "quantize_position")}, "config.json"
        )


@pytest.mark.parametrize("name", ["vq_encoder", "encode_segments"])
def test_golden(golden, name):
    checks = list(check_golden(read_golden(golden(f"codec/{name}"))))
    assert checks and all(check.passed for check in checks), checks


@pytest.mark.parametrize("name", ["resample", "whisper_logmel", "prompt_mel_24k", "kaldi_fbank"])
def test_golden_features(golden, name):
    checks = list(check_golden(read_golden(golden(f"codec/{name}"))))
    assert checks and all(check.passed for check in checks), checks


def test_a_round_trip_through_the_released_names(params):
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    again = table(TINY).to_ours(dict(table(TINY).to_theirs(flat)), flat, "here")
    assert jax.tree.all(jax.tree.map(np.array_equal, unflatten(again), unflatten(flat)))

"""Damaged JSON and YAML files of a release are readable errors."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.convert.codec_config import ReleasedYaml, read_released_yaml, released_yaml
from moss_jax.convert.language_model import language_config, special_ids, tokenizer_size
from moss_jax.convert.qwen3 import qwen3_keys
from moss_jax.convert.tables import speech_lm as speech_lm_table
from moss_jax.convert.tables import speech_tokenizer as tokenizer_table
from moss_jax.errors import MossError
from moss_jax.speech_decoder.config import RELEASED, TINY
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.vocoder import VocoderConfig
from moss_jax.speech_tokenizer.config import TINY as TOKENIZER
from tests.convert.checkpoints import write_language_model, write_qwen3


def read(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return read_released_yaml(path)


def test_the_defaults_are_the_released_values(tmp_path):
    assert read(tmp_path, "") == ReleasedYaml()
    assert read(tmp_path, released_yaml(RELEASED.flow, RELEASED.vocoder)) == ReleasedYaml()
    tiny = read(tmp_path, released_yaml(TINY.flow, TINY.vocoder))
    assert tiny.flow.decoder.estimator.num_heads == TINY.flow.estimator.num_heads
    assert tiny.hift.resblock_dilation_sizes == TINY.vocoder.resblock_dilations
    assert tiny.hift.sampling_rate == TINY.vocoder.sample_rate
    assert ReleasedYaml().hift.upsample_rates == VocoderConfig().upsample_rates
    assert ReleasedYaml().flow.decoder.cfm_params.content.inference_cfg_rate == FlowConfig().guidance


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("flow.decoder.estimator.num_heads", "abc", "num_heads is str 'abc', expected int"),
        ("flow.decoder.estimator.num_heads", "0", "num_heads is 0, expected 1 to 1024"),
        ("flow.decoder.estimator.num_heads", "-8", "num_heads is -8"),
        ("flow.decoder.estimator.num_heads", "8.0", "num_heads is float 8.0, expected int"),
        ("flow.decoder.estimator.num_heads", "true", "num_heads is bool True"),
        ("flow.decoder.estimator.num_heads", "1" + "0" * 40, "num_heads"),
        ("flow.decoder.cfm_params.content.inference_cfg_rate", "abc", "inference_cfg_rate is str 'abc'"),
        ("flow.decoder.cfm_params.content.inference_cfg_rate", ".nan", "inference_cfg_rate is nan, expected a finite"),
        ("flow.decoder.cfm_params.content.inference_cfg_rate", "-1", "inference_cfg_rate is -1"),
        ("flow.decoder.cfm_params.content", "5", "content is int 5, expected an object"),
        ("flow", "[1]", "flow is list"),
        ("hift", "null", "hift is null"),
        ("hift.upsample_rates", "5", "upsample_rates is int 5, expected a list"),
        ("hift.upsample_rates", "[8, x, 3]", r"upsample_rates\[1\] is str 'x'"),
        ("hift.upsample_rates", "[8, 0, 3]", r"upsample_rates\[1\] is 0"),
        ("hift.resblock_dilation_sizes", "[[1, 3, 5], 7]", r"resblock_dilation_sizes\[1\] is int 7"),
        ("hift.source_resblock_dilation_sizes", "[[-1]]", r"source_resblock_dilation_sizes\[0\]\[0\] is -1"),
        ("hift.lrelu_slope", "[1]", "lrelu_slope is list"),
        ("hift.sampling_rate", "hello", "sampling_rate is str 'hello'"),
        ("hift.sampling_rate", "0", "sampling_rate is 0, expected 1000 to"),
        ("hift.sampling_rate", "!ref <rate>", "sampling_rate is str '!ref <rate>'"),
        ("hift.sampling_rate", "2020-01-01", "sampling_rate is date"),
        ("hift.istft_params.hop_len", "0", "hop_len is 0, expected 1 to"),
        ("hift.istft_params", "16", "istft_params is int 16"),
        ("hift.nsf_sigma", ".inf", "nsf_sigma is inf"),
        ("hift.audio_limit", "0", "audio_limit is 0"),
    ],
)
def test_a_bad_value_in_the_yaml_is_named(tmp_path, key, value, message):
    *above, last = key.split(".")
    lines = [f"{'  ' * depth}{name}: !new:some.Class" for depth, name in enumerate(above)]
    with pytest.raises(MossError, match=message) as caught:
        read(tmp_path, "\n".join([*lines, f"{'  ' * len(above)}{last}: {value}\n"]))
    first = str(caught.value).splitlines()[0]
    assert "config.yaml" in first and key in first


def test_all_bad_values_are_named_at_once(tmp_path):
    text = "flow: {decoder: {estimator: {num_heads: abc}}}\nhift: {sampling_rate: hello, upsample_rates: 5}\n"
    with pytest.raises(MossError, match="and 2 more") as caught:
        read(tmp_path, text)
    assert all(name in str(caught.value) for name in ("num_heads", "sampling_rate", "upsample_rates"))


VALUES = st.sampled_from(
    [None, "x", "", 0, -1, 1.5, 2**31, 2**63, 10**30, 1e300, True, [], [1], {}, {"a": 1}, [[1]], "1", "9" * 5000]
)


def mutated(data, original):
    """A copy in which one value, or the whole entry, is another."""
    copy = json.loads(json.dumps(original))
    key = data.draw(st.sampled_from(sorted(copy)))
    if data.draw(st.booleans()):
        copy[key] = data.draw(VALUES)
    else:
        del copy[key]
    return copy


RELEASED_CODEC = {
    "d_model": 32,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 128,
    "pooling_position": 3,
    "max_source_positions": 60,
    "pooling_kernel_size": 4,
    "quantize_vocab_size": 96,
    "quantize_position": 3,
    "encoder_layers": 3,
    "pooling_type": "avg",
    "activation_function": "gelu",
    "encoder_causal_attention": True,
}


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_a_codec_config_with_another_value_is_read_or_refused(data):
    assert tokenizer_table.config_from_released(RELEASED_CODEC, "config.json") == TOKENIZER
    try:
        tokenizer_table.config_from_released(mutated(data, RELEASED_CODEC), "config.json")
    except MossError as error:
        assert str(error).startswith("config.json: ")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "model"
    write_language_model(folder)
    return folder


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_a_language_model_config_with_another_value_is_read_or_refused(language_model, data):
    ids = {"endoftext": 287, "im_start": 288, "im_end": 289}
    released = json.loads((language_model / "config.json").read_text())
    released |= {f"{name}_token_id": i for name, i in ids.items()}
    speech_lm_table.config_from_released(released, "config.json")
    try:
        speech_lm_table.config_from_released(mutated(data, released), "config.json")
    except MossError as error:
        assert str(error).startswith("config.json: ")


def test_a_qwen3_config_is_checked(tmp_path):
    write_qwen3(tmp_path / "qwen3", tied=False)
    path = tmp_path / "qwen3" / "config.json"
    original = json.loads(path.read_text())
    qwen3_keys(path)
    for key, value, message in (
        ("num_attention_heads", 0, "num_attention_heads is 0"),
        ("hidden_size", "64", "hidden_size is str '64'"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
        ("rms_norm_eps", [1], "rms_norm_eps is list"),
        ("rope_parameters", [1], "rope_parameters is"),
        ("head_dim", -2, "head_dim is -2"),
        ("rope_theta", "1e6", "rope_theta is str"),
    ):
        path.write_text(json.dumps(original | {key: value}))
        with pytest.raises(MossError, match=rf"config\.json: .*{message}"):
            qwen3_keys(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested deeper"),
        (b"{}", "not a tokenizer.json"),
        (b'{"model": {"vocab": {}}, "added_tokens": []}', "lacks a vocabulary"),
        (b'{"model": {"vocab": {"a": "b"}}, "added_tokens": []}', "token 'a' has id 'b'"),
        (b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b", "id": null}]}', "token 'b' has id null"),
        (b'{"model": {"vocab": {"a": -1}}, "added_tokens": []}', "token 'a' has id -1"),
        (b'{"model": {"vocab": {"a": 0}}, "added_tokens": [5]}', "5 is not an added token"),
        (b'{"model": {"type": "Unigram", "vocab": [["a", 0]]}, "added_tokens": []}', "not a BPE"),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for read_ids in (special_ids, tokenizer_size):
        with pytest.raises(MossError, match=rf"tokenizer\.json: .*{message}"):
            read_ids(path)


def test_a_release_config_that_is_no_json(language_model, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((language_model / "tokenizer.json").read_bytes())
    for content in (b"[" * 1000, b"[]", b'{"hidden_size": ' + b"9" * 5000 + b"}", b"\xff"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(MossError, match=r"config\.json: "):
            language_config(tmp_path)

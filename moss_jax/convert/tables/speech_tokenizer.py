"""Name table and config keys of the released codec's `model.safetensors`: the Whisper-VQ encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moss_jax.checkpoint.config_io import MAX_LAYERS, MAX_SIZE, read_config, within
from moss_jax.convert.table import CONV1D, LINEAR, NameTable, Row, heads_bias, heads_in, heads_out, prefixed
from moss_jax.documents import located, shown
from moss_jax.errors import MossError
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig


@dataclass(frozen=True)
class ReleasedTokenizerConfig:
    """The keys of the released codec's config.json that are used."""

    d_model: int = within(1, MAX_SIZE)
    encoder_attention_heads: int = within(1, MAX_SIZE)
    encoder_ffn_dim: int = within(1, MAX_SIZE)
    num_mel_bins: int = within(1, MAX_SIZE)
    max_source_positions: int = within(1, MAX_SIZE)
    pooling_kernel_size: int = within(1, MAX_SIZE)
    quantize_vocab_size: int = within(1, MAX_SIZE)
    quantize_position: int = within(1, MAX_LAYERS)
    pooling_position: int | None = None
    encoder_layers: int | None = None


def config_from_released(released: Mapping[str, Any], where: str) -> SpeechTokenizerConfig:
    """Our config from the keys of the released codec's `config.json`; unknown keys are ignored.

    Args:
        where: start of error messages.

    Raises:
        MossError: a key is missing, or describes another encoder.
    """
    fixed = {
        "encoder_causal_attention": True,
        "encoder_causal_convolution": True,
        "pooling_type": "avg",
        "activation_function": "gelu",
    }
    for key, value in fixed.items():
        if released.get(key, value) != value:
            raise MossError(f"{where}: {key} is {shown(released[key])}, this encoder has {value!r}")
    config = read_config(ReleasedTokenizerConfig, released, where, foreign=True)
    layers = config.quantize_position
    if config.pooling_position not in (None, layers):
        raise MossError(f"{where}: pooling_position is {config.pooling_position}, expected quantize_position, {layers}")
    if config.encoder_layers is not None and config.encoder_layers < layers:
        raise MossError(
            f"{where}: encoder_layers is {config.encoder_layers}, expected at least quantize_position, {layers}"
        )
    with located(where):
        return SpeechTokenizerConfig(
            sample_rate=16000,
            n_fft=400,
            hop_length=160,
            num_mel_bins=config.num_mel_bins,
            d_model=config.d_model,
            num_layers=layers,
            encoder_attention_heads=config.encoder_attention_heads,
            encoder_ffn_dim=config.encoder_ffn_dim,
            max_source_positions=config.max_source_positions,
            pooling_kernel_size=config.pooling_kernel_size,
            quantize_vocab_size=config.quantize_vocab_size,
            code_dim=config.d_model,
            normalize_codes=False,
            layer_norm_epsilon=1e-5,
        )


def table(config: SpeechTokenizerConfig) -> NameTable:
    """The name table. Unused and carried: layers after the quantizer, the moving averages of the codebook's training,
    and everything outside the encoder."""
    heads = config.encoder_attention_heads
    q = heads_out(heads)
    bias = heads_bias(heads)
    out = heads_in(heads)
    layer = prefixed(
        (
            Row("self_attn.q_proj.weight", "q/kernel", q),
            Row("self_attn.q_proj.bias", "q/bias", bias),
            Row("self_attn.k_proj.weight", "k/kernel", q),
            Row("self_attn.v_proj.weight", "v/kernel", q),
            Row("self_attn.v_proj.bias", "v/bias", bias),
            Row("self_attn.out_proj.weight", "o/kernel", out),
            Row("self_attn.out_proj.bias", "o/bias"),
            Row("self_attn_layer_norm.weight", "attention_norm/scale"),
            Row("self_attn_layer_norm.bias", "attention_norm/bias"),
            Row("fc1.weight", "up/kernel", LINEAR),
            Row("fc1.bias", "up/bias"),
            Row("fc2.weight", "down/kernel", LINEAR),
            Row("fc2.bias", "down/bias"),
            Row("final_layer_norm.weight", "mlp_norm/scale"),
            Row("final_layer_norm.bias", "mlp_norm/bias"),
        ),
        "layers.{layer}.",
        "layers/",
    )
    rows = (
        Row("conv1.weight", "conv1/kernel", CONV1D),
        Row("conv1.bias", "conv1/bias"),
        Row("conv2.weight", "conv2/kernel", CONV1D),
        Row("conv2.bias", "conv2/bias"),
        Row("embed_positions.weight", "positions"),
        *layer,
        Row("codebook.weight", "codebook"),
        Row("embed_positions2.weight", "code_positions"),
        # Only in models of this project: the projection to a low-dimensional codebook.
        Row("project.weight", "project/kernel", LINEAR),
        Row("project.bias", "project/bias"),
    )
    used = "|".join(str(layer) for layer in range(config.num_layers))
    carried = (
        r"(?!encoder\.).*",
        r"encoder\.ema_(count|weight)",
        r"encoder\.layer_norm\.(weight|bias)",
        rf"encoder\.layers\.(?!({used})\.)\d+\..*",
    )
    return NameTable(prefixed(rows, "encoder."), carried)

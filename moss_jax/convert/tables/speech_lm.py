"""Name table and config keys of fnlp/MOSS-Speech: 446 tensors, which are 40 layers of 11 and six more.

Source: the documented layout of the released checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moss_jax.checkpoint.config_io import MAX_LAYERS, MAX_SIZE, read_config, within
from moss_jax.convert.table import LINEAR, NameTable, Row, heads_in, heads_out, prefixed
from moss_jax.documents import located, shown
from moss_jax.errors import MossError
from moss_jax.speech_lm.config import SpeechLMConfig

SAME_KEY = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_shared_layers",
    "num_modality_layers",
    "audio_vocab_size",
    "rope_theta",
    "rms_norm_eps",
    "max_position_embeddings",
)
CONFIG_KEYS = {key: key for key in SAME_KEY} | {"text_vocab_size": "vocab_size"}  # our field -> key of config.json
ID_KEYS = {
    "endoftext_id": "endoftext_token_id",
    "im_start_id": "im_start_token_id",
    "im_end_id": "im_end_token_id",
    "sosp_id": "sosp_token_id",
    "modality_pad_id": "modality_pad_token_id",
    "eosp_id": "eosp_token_id",
    "audio_pad_id": "audio_pad_token_id",
}  # the released config.json lacks the first three, which are those of Qwen3 and our defaults


@dataclass(frozen=True)
class ReleasedSpeechLMConfig:
    """The keys of a released config.json that are used."""

    hidden_size: int = within(1, MAX_SIZE)
    intermediate_size: int = within(1, MAX_SIZE)
    num_attention_heads: int = within(1, MAX_SIZE)
    num_key_value_heads: int = within(1, MAX_SIZE)
    head_dim: int = within(2, MAX_SIZE)
    num_shared_layers: int = within(0, MAX_LAYERS)
    num_modality_layers: int = within(0, MAX_LAYERS)
    vocab_size: int = within(1, MAX_SIZE)
    audio_vocab_size: int = within(0, MAX_SIZE)
    rope_theta: float = within(1, 1e12)
    rms_norm_eps: float = within(0, 1)
    max_position_embeddings: int = within(1, MAX_SIZE)
    num_hidden_layers: int | None = within(0, 2 * MAX_LAYERS, None)
    endoftext_token_id: int | None = within(0, MAX_SIZE, None)
    im_start_token_id: int | None = within(0, MAX_SIZE, None)
    im_end_token_id: int | None = within(0, MAX_SIZE, None)
    sosp_token_id: int | None = within(0, MAX_SIZE, None)
    modality_pad_token_id: int | None = within(0, MAX_SIZE, None)
    eosp_token_id: int | None = within(0, MAX_SIZE, None)
    audio_pad_token_id: int | None = within(0, MAX_SIZE, None)


def config_from_released(released: Mapping[str, Any], where: str) -> SpeechLMConfig:
    """Our config from the keys of a released `config.json`; unknown keys are ignored.

    Args:
        where: start of error messages.

    Raises:
        MossError: a key is missing, or describes another model (biases, another activation, scaled RoPE).
    """
    config = read_config(ReleasedSpeechLMConfig, released, where, foreign=True)
    for key, expected in {"attention_bias": False, "hidden_act": "silu", "rope_scaling": None}.items():
        if released.get(key, expected) != expected:
            raise MossError(f"{where}: config has {key} = {shown(released[key])}, expected {expected!r}")
    depth = config.num_shared_layers + config.num_modality_layers
    if config.num_hidden_layers not in (None, depth):
        raise MossError(
            f"{where}: config has num_hidden_layers = {config.num_hidden_layers}, but {depth} shared and modality "
            "layers; the first must be the sum of the others"
        )
    ids = {ours: i for ours, theirs in ID_KEYS.items() if (i := getattr(config, theirs)) is not None}
    with located(where):
        return SpeechLMConfig(**{ours: getattr(config, theirs) for ours, theirs in CONFIG_KEYS.items()}, **ids)


def layer_rows(config: SpeechLMConfig) -> tuple[Row, ...]:
    """The rows of a Qwen3 layer; names and paths are relative to the layer."""
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads
    return (
        Row("input_layernorm.weight", "attention_norm/scale"),
        Row("self_attn.q_proj.weight", "attention/q/kernel", heads_out(heads)),
        Row("self_attn.k_proj.weight", "attention/k/kernel", heads_out(kv_heads)),
        Row("self_attn.v_proj.weight", "attention/v/kernel", heads_out(kv_heads)),
        Row("self_attn.o_proj.weight", "attention/o/kernel", heads_in(heads)),
        Row("self_attn.q_norm.weight", "attention/q_norm/scale"),
        Row("self_attn.k_norm.weight", "attention/k_norm/scale"),
        Row("post_attention_layernorm.weight", "mlp_norm/scale"),
        Row("mlp.gate_proj.weight", "mlp/gate/kernel", LINEAR),
        Row("mlp.up_proj.weight", "mlp/up/kernel", LINEAR),
        Row("mlp.down_proj.weight", "mlp/down/kernel", LINEAR),
    )


def table(config: SpeechLMConfig) -> NameTable:
    """The name table of the released layer-split checkpoint."""
    rows = [
        Row("model.embed_tokens.weight", "text/embed/embedding"),
        Row("model.audio_embed.weight", "audio/embed/embedding"),
        Row("model.text_norm.weight", "text/norm/scale"),
        Row("model.audio_norm.weight", "audio/norm/scale"),
        Row("text_lm_head.weight", "text/head/kernel", LINEAR),
        Row("audio_lm_head.weight", "audio/head/kernel", LINEAR),
    ]
    for block in ("shared", "text", "audio"):
        rows += prefixed(layer_rows(config), f"model.{block}_block.layers.{{layer}}.", f"{block}/layers/")
    return NameTable(tuple(rows))

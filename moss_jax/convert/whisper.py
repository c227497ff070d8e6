"""Initial weights for training a speech tokenizer, from a Whisper model of Hugging Face.

Its encoder layers are used before and after the quantizer, and its decoder as the recognition head.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.checkpoint import open_tensors
from moss_jax.checkpoint.config_io import read_config
from moss_jax.convert.tables import whisper as whisper_table
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.progress import Say
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig

ENCODER_LAYER = re.compile(r"model\.encoder\.layers\.(\d+)\.(.*)")
NEW_PARAMETERS = (
    "encoder/codebook",
    "encoder/code_positions",
    "encoder/project/",
    "head/lift/",
    "head/mel_",
    "head/ctc/",
)


@dataclass(frozen=True)
class WhisperConfig:
    """The keys of a Whisper's config.json that are used."""

    d_model: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    num_mel_bins: int
    max_source_positions: int
    encoder_layers: int
    decoder_attention_heads: int | None = None


def import_whisper(
    folder: str | Path, config: SpeechTokenizerConfig, parameters: Mapping[str, Any], say: Say
) -> dict[str, np.ndarray]:
    """Values for those of `parameters` that a Whisper has, in float32.

    The codebook, the projections around it, the mel head and a CTC head have no counterpart. The convolutions and the
    attention before the quantizer become causal, so the encoder has to adapt; that takes few steps.

    Args:
        folder: with config.json and model.safetensors.
        config: of the speech tokenizer.
        parameters: flat {path: array} of the new model, paths `encoder/...` and `head/...`.

    Returns:
        Flat {path: array}.

    Raises:
        MossError: the sizes differ from those of `config`, or tensors are missing or misshapen.
    """
    folder = Path(folder)
    whisper = read_config(WhisperConfig, read_json(folder / "config.json"), folder / "config.json", foreign=True)
    for name in ("d_model", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins", "max_source_positions"):
        if getattr(whisper, name) != getattr(config, name):
            raise MossError(
                f"{folder}: its {name} is {getattr(whisper, name)}, the run's model has {getattr(config, name)}"
            )
    wanted = {path: leaf for path, leaf in parameters.items() if not path.startswith(NEW_PARAMETERS)}
    attention = "head/decoder_norm/scale" in wanted
    if attention and whisper.decoder_attention_heads != config.encoder_attention_heads:
        raise MossError(f"{folder}: encoder and decoder have different numbers of heads, expected the same")
    reader = open_tensors(folder)
    names = {_table_name(name, config.num_layers): name for name in reader.tensors}  # name in the table -> in the file
    if not attention:
        names = {key: name for key, name in names.items() if not key.startswith("model.decoder.")}
    table = whisper_table.table(config.encoder_attention_heads)
    table.check({key: tuple(reader.tensors[name].shape) for key, name in names.items()}, wanted, str(folder))
    layers = f"{config.num_layers} of its {whisper.encoder_layers} layers before the codes"
    say(f"initialized from the Whisper in {folder}: {layers}")
    return {
        entry.path: entry.to_ours(lambda name: np.asarray(reader.read(names[name]), np.float32))
        for entry in table.entries(wanted)
    }


def _table_name(name: str, layers_before: int) -> str:
    """The name in our table: encoder layers after the quantizer are called "after" and counted from 0."""
    match = ENCODER_LAYER.fullmatch(name)
    if match and int(match[1]) >= layers_before:
        return f"model.encoder.after.{int(match[1]) - layers_before}.{match[2]}"
    return name

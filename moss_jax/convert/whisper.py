"""A Whisper of Hugging Face as the beginning of a speech tokenizer's training: its encoder, before and after the
quantiser, and its decoder as the recogniser."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.checkpoint import open_tensors
from moss_jax.checkpoint.config_io import read_config
from moss_jax.convert.tables import whisper as whisper_table
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig

LAYER = re.compile(r"model\.encoder\.layers\.(\d+)\.(.*)")
NEW = ("encoder/codebook", "encoder/code_positions", "encoder/project/", "head/lift/", "head/mel_", "head/ctc/")


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
    folder: str | Path, config: SpeechTokenizerConfig, parameters: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Those of `parameters` (flat paths `encoder/...`, `head/...`) that a Whisper has, in float32.

    What it has not stays as it was: the codebook, what leads to it and away from it, the mel network, a CTC head. Its
    convolutions and its attention before the quantiser become causal, so it has to learn anew; it learns fast.

    Args:
        folder: with config.json and model.safetensors.
        parameters: what is to be filled, new.

    Raises:
        MossError: the sizes are not those of `config`, or tensors are missing or misshapen.
    """
    folder = Path(folder)
    about = read_config(WhisperConfig, read_json(folder / "config.json"), folder / "config.json", foreign=True)
    for name in ("d_model", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins", "max_source_positions"):
        if getattr(about, name) != getattr(config, name):
            raise MossError(
                f"{folder}: its {name} is {getattr(about, name)}, the run's model has {getattr(config, name)}"
            )
    wanted = {path: leaf for path, leaf in parameters.items() if not path.startswith(NEW)}
    attention = "head/decoder_norm/scale" in wanted
    if attention and about.decoder_attention_heads != config.encoder_attention_heads:
        raise MossError(f"{folder}: encoder and decoder have different numbers of heads, expected the same")
    reader = open_tensors(folder)
    names = {_renamed(name, config.num_layers): name for name in reader.tensors}
    names = {ours: name for ours, name in names.items() if attention or not ours.startswith("model.decoder.")}
    table = whisper_table.table(config.encoder_attention_heads)
    table.check({ours: tuple(reader.tensors[name].shape) for ours, name in names.items()}, wanted, str(folder))
    layers = f"{config.num_layers} of its {about.encoder_layers} layers before the codes"
    say(f"begins with the Whisper in {folder}: {layers}")
    return {
        entry.path: entry.to_ours(lambda name: np.asarray(reader.read(names[name]), np.float32))
        for entry in table.entries(wanted)
    }


def _renamed(name: str, before: int) -> str:
    """The layers after the quantiser counted from 0 under a name of their own."""
    found = LAYER.fullmatch(name)
    if found and int(found[1]) >= before:
        return f"model.encoder.after.{int(found[1]) - before}.{found[2]}"
    return name

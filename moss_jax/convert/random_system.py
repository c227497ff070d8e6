"""Writes complete systems with random weights."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.arguments import check_seed
from moss_jax.checkpoint import TensorWriter
from moss_jax.checkpoint.config_io import write_config
from moss_jax.checkpoint.old_names import old_path
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SYSTEM_FORMAT
from moss_jax.convert.files import write_json
from moss_jax.convert.stream import CopyProgress
from moss_jax.convert.system import export_released
from moss_jax.convert.table import NameTable, TableEntry
from moss_jax.convert.tables import flow as flow_table
from moss_jax.convert.tables import speaker as speaker_table
from moss_jax.convert.tables import speech_lm as speech_lm_table
from moss_jax.convert.tables import speech_tokenizer as tokenizer_table
from moss_jax.convert.tables import vocoder as vocoder_table
from moss_jax.convert.text_tokenizer import write_text_tokenizer
from moss_jax.errors import MossError
from moss_jax.files import atomic_folder
from moss_jax.progress import Say
from moss_jax.speech_decoder import config as decoder_config
from moss_jax.speech_decoder import speaker as speaker_config
from moss_jax.speech_decoder.config import SpeechDecoderConfig, flow_stem
from moss_jax.speech_decoder.flow.model import flow_shapes
from moss_jax.speech_decoder.speaker import speaker_shapes
from moss_jax.speech_decoder.vocoder import vocoder_shapes
from moss_jax.speech_lm import model_shapes
from moss_jax.speech_lm.config import MOSS_SPEECH_8B, SpeechLMConfig
from moss_jax.speech_lm.config import TINY as SPEECH_LM_TINY
from moss_jax.speech_tokenizer import config as tokenizer_config
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import encoder_shapes


@dataclass(frozen=True)
class SystemConfigs:
    """The configs of all components of a system."""

    transformer: SpeechLMConfig
    tokenizer: SpeechTokenizerConfig
    decoder: SpeechDecoderConfig


TINY_CODES = 256  # number of speech codes of the tiny system


def _tiny() -> SystemConfigs:
    """Small layers, but the sample rates and code rate of the release, so that it works on real audio."""
    decoder = decoder_config.TINY
    flow = replace(
        decoder.flow,
        vocab_size=TINY_CODES + 32,
        codebook_size=TINY_CODES,
        mel_bins=80,
        speaker_size=192,
        chunk=25,
        noise_frames=15000,
    )
    speaker = replace(speaker_config.TINY, num_mel_bins=80, embedding_size=192)
    return SystemConfigs(
        replace(
            SPEECH_LM_TINY,
            audio_vocab_size=384,
            eosp_id=TINY_CODES,
            audio_pad_id=TINY_CODES - 1,
            max_position_embeddings=40960,
        ),
        replace(tokenizer_config.TINY, quantize_vocab_size=TINY_CODES, max_source_positions=1500),
        replace(decoder, flow=flow, vocoder=replace(decoder.vocoder, mel_bins=80), speaker=speaker, chunks=(5, 25)),
    )


# A language model of the size of Qwen3-0.6B, for the released codec.
SPEECH_LM_0_6B = replace(
    MOSS_SPEECH_8B,
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    num_shared_layers=25,
    num_modality_layers=3,
)
SYSTEM_SIZES = {
    "tiny": _tiny(),
    "0.6b": SystemConfigs(SPEECH_LM_0_6B, tokenizer_config.MOSS_SPEECH_CODEC, decoder_config.RELEASED),
    "8b": SystemConfigs(MOSS_SPEECH_8B, tokenizer_config.MOSS_SPEECH_CODEC, decoder_config.RELEASED),
}
LAYOUTS = ("ours", "released")


def init_random(out: str | Path, size: str = "tiny", layout: str = "ours", seed: int = 0, say: Say = print) -> None:
    """Writes a complete system with random weights. It works like any other, but its replies are noise.

    Args:
        out: folder of the system; with layout "released", the folder for the two released folders.
        size: a key of SYSTEM_SIZES.
        layout: one of LAYOUTS; "released" needs torch and onnx.
        seed: the same seed gives the same weights.
        say: receives progress messages.

    Raises:
        MossError: unknown size or layout, or `out` exists or cannot be written.
    """
    seed = check_seed(seed)
    if size not in SYSTEM_SIZES:
        raise MossError(f"size is {size!r}, expected one of {', '.join(SYSTEM_SIZES)}")
    if layout not in LAYOUTS:
        raise MossError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout == "ours":
        with atomic_folder(out) as folder:
            write_random(folder, SYSTEM_SIZES[size], seed, say)
        return
    with atomic_folder(out) as folder:
        system = folder / ".system"
        system.mkdir()
        write_random(system, SYSTEM_SIZES[size], seed, say)
        export_released(system, folder / ".released", say)
        for part in (folder / ".released").iterdir():
            part.rename(folder / part.name)
        (folder / ".released").rmdir()
        shutil.rmtree(system)


def write_random(folder: Path, sizes: SystemConfigs, seed: int, say: Say) -> None:
    """Writes the files of a random system into an existing folder, with one parameter in memory at a time."""
    lm = sizes.transformer
    tokenizer = sizes.tokenizer
    decoder = sizes.decoder
    flow = flow_shapes(decoder.flow)
    flow_rows = flow_table.table(decoder.flow)
    parts = [
        ("transformer", "model", speech_lm_table.table(lm), model_shapes(lm)),
        ("speech_tokenizer", "model", tokenizer_table.table(tokenizer), encoder_shapes(tokenizer)),
        *(("speech_decoder", flow_stem(chunk), flow_rows, flow) for chunk in (None, *decoder.chunks)),
        ("speech_decoder", "vocoder", vocoder_table.table(decoder.vocoder), vocoder_shapes(decoder.vocoder)),
    ]
    if decoder.speaker is not None:
        rows = speaker_table.table(decoder.speaker)
        shapes = speaker_shapes(decoder.speaker)
        parts.append(("speech_decoder", "speaker", rows, shapes))
    for component, stem, table, shapes in parts:
        (folder / component).mkdir(exist_ok=True)
        # All flows have the same seed, so that streaming sounds like offline decoding.
        _write_part(folder / component, stem, table, shapes, f"{seed} {component} {stem.split('_')[0]}", say)
        say(f"{component}/{stem}.safetensors: done")
    for component, config in (("transformer", lm), ("speech_tokenizer", tokenizer), ("speech_decoder", decoder)):
        write_json(folder / component / "config.json", write_config(config))
    (folder / "text_tokenizer").mkdir()
    write_text_tokenizer(folder / "text_tokenizer" / "tokenizer.json", lm)
    (folder / "voices").mkdir()
    write_json(folder / SYSTEM_FILE, {"format": SYSTEM_FORMAT, "default_voice": None})


def _write_part(folder: Path, stem: str, table: NameTable, shapes: Mapping[str, Any], seed: str, say: Say) -> None:
    progress = CopyProgress(say, f"writing {folder.name}/{stem}", shapes)
    with TensorWriter(folder, shapes, stem) as writer:
        for entry in table.entries(shapes):
            # Seeded by the path that the parameter had in version 0.1.0, so that a seed still gives the same system.
            path = entry.path if folder.name == "transformer" else old_path(entry.path)
            writer.write(entry.path, random_parameter(entry, f"{seed} {path}"))
            progress.add(shapes[entry.path])


def random_parameter(entry: TableEntry, seed: str) -> np.ndarray:
    """Values that preserve the scale of a signal: gains of 1, biases of 0, kernels of variance 1 / inputs.

    The normal values are drawn one layer at a time and converted to the dtype of the parameter.
    """
    leaf = entry.path.rpartition("/")[2]
    dtype = np.dtype(entry.dtype)
    if leaf in ("scale", "var", "g", "alpha"):
        return np.ones(entry.shape, dtype)
    if leaf in ("bias", "mean", "bias_u", "bias_v"):
        return np.zeros(entry.shape, dtype)
    # In the released layout all axes but the first are inputs. Embeddings have a standard deviation of 1.
    std = 1.0 if leaf in ("embedding", "codebook") else 1 / np.sqrt(np.prod(entry.source_shape[1:]))
    out = np.empty(entry.shape, dtype)
    rng = np.random.default_rng(list(seed.encode()))
    for index in np.ndindex(entry.names.shape):
        part = rng.standard_normal(entry.shape[len(index) :], np.float32)
        out[index] = np.multiply(part, np.float32(std), out=part)
    return out

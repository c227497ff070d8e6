"""Import and export of the released codec `fnlp/MOSS-Speech-Codec`.

    config.json, preprocessor_config.json, model.safetensors          speech tokenizer
    flow/flow.pt, flow-chunk-5.pt, flow-chunk-25.pt                    flow, offline and for streaming
    flow/hift.pt, flow/campplus.onnx, flow/config.yaml                 vocoder, speaker network, sizes

In a system: `speech_tokenizer/`, `speech_decoder/`, and below `carried/`: `codec/` (files that are not converted, the
ONNX graph), `unused/` (tensors that the models do not use), `codec.json` (counters of the .pt files, name spelling).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_jax.checkpoint import TensorReader, open_tensors
from moss_jax.checkpoint.config_io import read_config, write_config
from moss_jax.convert.codec_config import (
    ReleasedYaml,
    flow_config,
    read_released_yaml,
    released_tokenizer_config,
    released_yaml,
    vocoder_config,
)
from moss_jax.convert.files import carry_files, files_to_carry, report_unknown_keys, require_folder, write_json
from moss_jax.convert.onnx_speaker import SpeakerGraph
from moss_jax.convert.onnx_write import write_speaker_graph
from moss_jax.convert.stream import (
    ONE_FILE,
    MergedTensors,
    Say,
    TensorSource,
    exported_tensors,
    import_tensors,
    tensor_shapes,
    write_source,
)
from moss_jax.convert.table import NameTable
from moss_jax.convert.tables import flow as flow_table
from moss_jax.convert.tables import speaker as speaker_table
from moss_jax.convert.tables import speech_tokenizer as tokenizer_table
from moss_jax.convert.tables import vocoder as vocoder_table
from moss_jax.convert.torch_file import read_torch, write_torch
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.files import is_file
from moss_jax.speech_decoder.config import SpeechDecoderConfig, flow_stem
from moss_jax.speech_decoder.flow.model import flow_shapes
from moss_jax.speech_decoder.speaker import speaker_shapes
from moss_jax.speech_decoder.vocoder import vocoder_shapes
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import encoder_shapes

CHUNK_FILE = re.compile(r"flow-chunk-(\d+)\.pt")
REQUIRED_FILES = ("config.json", "model.safetensors", "flow/flow.pt", "flow/hift.pt", "flow/campplus.onnx")
# Keys of config.json that are read, that concern training only, and that every Whisper config has.
KNOWN_KEYS = {
    "d_model",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "encoder_layers",
    "num_mel_bins",
    "max_source_positions",
    "activation_function",
    "encoder_causal_attention",
    "encoder_causal_convolution",
    "pooling_kernel_size",
    "pooling_type",
    "pooling_position",
    "quantize_vocab_size",
    "quantize_position",
    "quantize_encoder_only",
    "quantize_causal_encoder",
    "quantize_causal_block_size",
    "quantize_commit_coefficient",
    "quantize_ema_decay",
    "quantize_loss_scale",
    "quantize_restart_interval",
    "architectures",
    "model_type",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "vocab_size",
    "num_hidden_layers",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "decoder_layerdrop",
    "decoder_start_token_id",
    "encoder_layerdrop",
    "use_cache",
    "is_encoder_decoder",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "init_std",
    "scale_embedding",
    "max_target_positions",
    "max_length",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_decoder_ids",
    "use_weighted_layer_sum",
    "classifier_proj_size",
    "apply_spec_augment",
    "mask_time_prob",
    "mask_time_length",
    "mask_time_min_masks",
    "mask_feature_prob",
    "mask_feature_length",
    "mask_feature_min_masks",
    "median_filter_width",
    "skip_language_detection",
}
NOTES_FILE = "carried/codec.json"  # {file: {"extras": counters, "spelling": fields of vocoder_table.Spelling}}


@dataclasses.dataclass(frozen=True)
class CodecConfigs:
    """The configs of speech tokenizer and speech decoder."""

    tokenizer: SpeechTokenizerConfig
    decoder: SpeechDecoderConfig


def import_codec(folder: str | Path, system: Path, say: Say) -> CodecConfigs:
    """Writes `speech_tokenizer/`, `speech_decoder/` and the codec's part of `carried/` from a released folder.

    Raises:
        MossError: a file is missing or damaged, a config lacks keys, or tensors are unmapped, missing or misshapen.
    """
    folder = require_folder(folder, "a released codec (config.json, model.safetensors, flow/)")
    _check_files(folder)
    reader = open_tensors(folder)
    chunks = _chunks(folder / "flow")
    decoder_files = [_flow_file(chunk) for chunk in (None, *chunks)] + ["hift.pt"]
    used = [*reader.files(), *(folder / "flow" / file for file in decoder_files)]
    files_to_carry(folder, used)  # raises for bad links before the long work
    tokenizer = _import_tokenizer(folder, reader, system, say)
    decoder, notes = _import_decoder(folder, chunks, tokenizer, system, say)
    report_unknown_keys(folder / "config.json", KNOWN_KEYS, say)
    if not chunks:
        say(f"note: {folder / 'flow'} has no flow-chunk-*.pt; streaming will use the offline flow")
    carry_files(folder, system / "carried" / "codec", used)
    write_json(system / NOTES_FILE, notes)
    return CodecConfigs(tokenizer, decoder)


def _check_files(folder: Path) -> None:
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if "model.safetensors" in missing and (folder / "model.safetensors.index.json").is_file():
        missing.remove("model.safetensors")  # it is divided into several files
    if missing:
        raise MossError(f"{folder}: not a complete released codec, missing: {', '.join(missing)}")


def _import_tokenizer(folder: Path, reader: TensorReader, system: Path, say: Say) -> SpeechTokenizerConfig:
    config_file = folder / "config.json"
    config = tokenizer_table.config_from_released(read_json(config_file), str(config_file))
    target = system / "speech_tokenizer"
    target.mkdir(parents=True)
    import_tensors(
        reader,
        tokenizer_table.table(config),
        encoder_shapes(config),
        target,
        carried=system / "carried" / "unused" / "speech_tokenizer.safetensors",
        say=say,
    )
    write_json(target / "config.json", write_config(config))
    say("speech tokenizer: done")
    return config


def _import_decoder(
    folder: Path, chunks: Sequence[int], tokenizer: SpeechTokenizerConfig, system: Path, say: Say
) -> tuple[SpeechDecoderConfig, dict[str, Any]]:
    """Writes `speech_decoder/`; returns its config and the notes on the .pt files that an export needs."""
    target = system / "speech_decoder"
    target.mkdir()
    yaml_file = folder / "flow" / "config.yaml"
    yaml = read_released_yaml(yaml_file) if is_file(yaml_file) else ReleasedYaml()
    notes: dict[str, Any] = {}

    source, extras = read_torch(folder / "flow" / "flow.pt")
    flow = flow_config(tensor_shapes(source), yaml, tokenizer.quantize_vocab_size, str(source.path))
    table = flow_table.table(flow)
    for chunk in (None, *chunks):
        file = _flow_file(chunk)
        if chunk is not None:
            source, extras = read_torch(folder / "flow" / file)
        _check_extras(extras, table, source.path)
        notes[file] = {"extras": extras}
        _import_part(source, table, flow_shapes(flow), system, flow_stem(chunk), say)

    source, extras = read_torch(folder / "flow" / "hift.pt")
    spelling = vocoder_table.spelling(source.tensors)
    vocoder = vocoder_config(tensor_shapes(source), spelling, yaml, str(source.path))
    table = vocoder_table.table(vocoder, spelling)
    _check_extras(extras, table, source.path)
    notes["hift.pt"] = {"extras": extras, "spelling": dataclasses.asdict(spelling)}
    _import_part(source, table, vocoder_shapes(vocoder), system, "vocoder", say)

    graph = SpeakerGraph(folder / "flow" / "campplus.onnx")
    speaker = graph.config
    _import_part(graph.tensors(), speaker_table.table(speaker), speaker_shapes(speaker), system, "speaker", say)

    config = SpeechDecoderConfig(
        flow=flow,
        vocoder=vocoder,
        speaker=speaker,
        chunks=tuple(chunks),
        code_rate=tokenizer.code_rate,
    )
    write_json(target / "config.json", write_config(config))
    return config, notes


def export_codec(system: str | Path, folder: Path, say: Say) -> None:
    """Writes the codec of a system in the released layout into an existing folder."""
    system = Path(system)
    codec = read_codec_configs(system)
    carried = system / "carried" / "codec"
    (folder / "flow").mkdir(exist_ok=True)
    notes: dict[str, Any] = {}
    if carried.is_dir():
        carry_files(carried, folder, within=system)
        notes = read_json(system / NOTES_FILE)
    else:
        _write_released_configs(codec, folder)

    table = tokenizer_table.table(codec.tokenizer)
    source = _export_part(system, "speech_tokenizer", "model", table, encoder_shapes(codec.tokenizer))
    write_source(source, folder, metadata={"format": "pt"}, say=say)

    flow = codec.decoder.flow
    table = flow_table.table(flow)
    for chunk in (None, *codec.decoder.chunks):
        file = _flow_file(chunk)
        source = _export_part(system, "speech_decoder", flow_stem(chunk), table, flow_shapes(flow))
        write_torch(folder / "flow" / file, source, notes.get(file, {}).get("extras", {}))
        say(f"flow/{file}: done")

    vocoder = codec.decoder.vocoder
    vocoder_notes = notes.get("hift.pt", {})
    table = vocoder_table.table(vocoder, vocoder_table.Spelling(**vocoder_notes.get("spelling", {})))
    source = _export_part(system, "speech_decoder", "vocoder", table, vocoder_shapes(vocoder))
    write_torch(folder / "flow" / "hift.pt", source, vocoder_notes.get("extras", {}))

    speaker = codec.decoder.speaker
    if speaker is None:
        raise MossError(f"{system}: has no speaker network, but the released layout has campplus.onnx")
    source = _export_part(system, "speech_decoder", "speaker", speaker_table.table(speaker), speaker_shapes(speaker))
    onnx = folder / "flow" / "campplus.onnx"
    if onnx.is_file():
        SpeakerGraph(onnx).write(onnx, source)
    else:
        write_speaker_graph(onnx, source, speaker)


def _write_released_configs(codec: CodecConfigs, folder: Path) -> None:
    """The config files of a codec that was not imported from a release."""
    tokenizer = codec.tokenizer
    write_json(folder / "config.json", released_tokenizer_config(tokenizer))
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": tokenizer.num_mel_bins,
        "sampling_rate": tokenizer.sample_rate,
        "n_fft": tokenizer.n_fft,
        "hop_length": tokenizer.hop_length,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    yaml = released_yaml(codec.decoder.flow, codec.decoder.vocoder)
    (folder / "flow" / "config.yaml").write_text(yaml, encoding="utf-8")


def read_codec_configs(system: Path) -> CodecConfigs:
    """The configs of the codec in a system folder. Raises MossError if one is missing or wrong."""
    tokenizer_file = system / "speech_tokenizer" / "config.json"
    decoder_file = system / "speech_decoder" / "config.json"
    return CodecConfigs(
        read_config(SpeechTokenizerConfig, read_json(tokenizer_file), str(tokenizer_file)),
        read_config(SpeechDecoderConfig, read_json(decoder_file), str(decoder_file)),
    )


def _import_part(
    source: TensorSource, table: NameTable, shapes: Mapping[str, Any], system: Path, stem: str, say: Say
) -> None:
    unused = system / "carried" / "unused" / f"{stem}.safetensors"
    import_tensors(source, table, shapes, system / "speech_decoder", stem, unused, say, shard_bytes=ONE_FILE)
    say(f"{stem.replace('_', ' ')}: done")


def _export_part(system: Path, component: str, stem: str, table: NameTable, shapes: Mapping[str, Any]) -> TensorSource:
    """The released tensors of one of our files, with the unused ones that were carried."""
    part = exported_tensors(open_tensors(system / component / f"{stem}.safetensors"), table, shapes)
    unused = system / "carried" / "unused" / f"{component if stem == 'model' else stem}.safetensors"
    return MergedTensors(part, open_tensors(unused)) if unused.is_file() else part


def _flow_file(chunk: int | None) -> str:
    """The released file of the flow for a chunk size; None: the offline flow."""
    return "flow.pt" if chunk is None else f"flow-chunk-{chunk}.pt"


def _chunks(folder: Path) -> list[int]:
    """Chunk sizes, in codes, for which a released folder has a streaming flow."""
    matches = (CHUNK_FILE.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _check_extras(extras: Mapping[str, Any], table: NameTable, path: Path) -> None:
    """Raises MossError if a .pt file holds numbers other than training counters."""
    if unknown := [name for name in extras if not (table.is_carried(name) or name in ("epoch", "step"))]:
        lines = [f"unmapped: {name} = {extras[name]!r}" for name in unknown]
        raise MossError("\n  ".join([f"{path}: unknown entries", *lines]))

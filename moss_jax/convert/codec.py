"""The released codec `fnlp/MOSS-Speech-Codec`, in and out.

    config.json, preprocessor_config.json, model.safetensors          the speech tokenizer
    flow/flow.pt, flow-chunk-5.pt, flow-chunk-25.pt                    the flow, offline and for streams
    flow/hift.pt, flow/campplus.onnx, flow/config.yaml                 vocoder, speaker network, sizes

In a system: `speech_tokenizer/`, `speech_decoder/`, and below `carried/`: `codec/` (files that are not read, the ONNX
graph), `unused/` (tensors that the models do not use), `codec.json` (counters in the .pt files, spelling of names).
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moss_jax.checkpoint import open_tensors
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
NEEDED = ("config.json", "model.safetensors", "flow/flow.pt", "flow/hift.pt", "flow/campplus.onnx")
# Of config.json: what decides the codes, what concerns training, and what every Whisper has.
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
NOTES = "carried/codec.json"


@dataclasses.dataclass(frozen=True)
class Codec:
    """The configs of an imported codec."""

    tokenizer: SpeechTokenizerConfig
    decoder: SpeechDecoderConfig


def import_codec(folder: str | Path, system: Path, say: Say) -> Codec:
    """Writes `speech_tokenizer/`, `speech_decoder/` and what is carried of a system from a released folder.

    Raises:
        MossError: a file is missing or damaged, a config lacks keys, or names are unmapped, missing or misshapen.
    """
    folder = require_folder(folder, "a released codec (config.json, model.safetensors, flow/)")
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        if missing == ["model.safetensors"] and (folder / "model.safetensors.index.json").is_file():
            missing = []
        if missing:
            raise MossError(f"{folder}: not a whole released codec, missing: {', '.join(missing)}")
    carried = system / "carried"
    unused = carried / "unused"
    reader = open_tensors(folder)
    chunks = _chunks(folder / "flow")
    files = {None: "flow.pt", **{chunk: f"flow-chunk-{chunk}.pt" for chunk in chunks}}
    used = [*reader.files(), *(folder / "flow" / file for file in (*files.values(), "hift.pt"))]
    files_to_carry(folder, used)  # reports links that are not followed before the long work
    tokenizer = tokenizer_table.config_from_released(read_json(folder / "config.json"), str(folder / "config.json"))
    target = system / "speech_tokenizer"
    target.mkdir(parents=True)
    import_tensors(
        reader,
        tokenizer_table.table(tokenizer),
        encoder_shapes(tokenizer),
        target,
        carried=unused / "speech_tokenizer.safetensors",
        say=say,
    )
    write_json(target / "config.json", write_config(tokenizer))
    say("speech tokenizer: done")

    target = system / "speech_decoder"
    notes = {}
    target.mkdir()
    yaml_file = folder / "flow" / "config.yaml"
    yaml = read_released_yaml(yaml_file) if is_file(yaml_file) else ReleasedYaml()
    flow = None
    for stem, file in files.items():
        source, extras = read_torch(folder / "flow" / file)
        shapes = tensor_shapes(source)
        if flow is None:
            flow = flow_config(shapes, yaml, tokenizer.quantize_vocab_size, str(source.path))
        table = flow_table.table(flow)
        _check_extras(extras, table, source.path)
        notes[file] = {"extras": extras}
        _import_part(source, table, flow_shapes(flow), system, flow_stem(stem), say)
    source, extras = read_torch(folder / "flow" / "hift.pt")
    shapes = tensor_shapes(source)
    spelling = vocoder_table.spelling(shapes)
    vocoder = vocoder_config(shapes, spelling, yaml, str(source.path))
    table = vocoder_table.table(vocoder, spelling)
    _check_extras(extras, table, source.path)
    notes["hift.pt"] = {"extras": extras, "spelling": dataclasses.asdict(spelling)}
    _import_part(source, table, vocoder_shapes(vocoder), system, "vocoder", say)
    graph = SpeakerGraph(folder / "flow" / "campplus.onnx")
    speaker = graph.config
    _import_part(graph.tensors(), speaker_table.table(speaker), speaker_shapes(speaker), system, "speaker", say)
    decoder = SpeechDecoderConfig(
        flow=flow,
        vocoder=vocoder,
        speaker=speaker,
        chunks=tuple(chunks),
        code_rate=tokenizer.code_rate,
    )
    write_json(target / "config.json", write_config(decoder))
    report_unknown_keys(folder / "config.json", KNOWN_KEYS, say)
    if not chunks:
        say(f"note: {folder / 'flow'} has no flow-chunk-*.pt: streams will use the offline flow")
    carry_files(folder, carried / "codec", used)
    write_json(system / NOTES, notes)
    return Codec(tokenizer, decoder)


def export_codec(system: str | Path, folder: Path, say: Say) -> None:
    """Writes the codec of a system in the released layout into an existing folder."""
    system = Path(system)
    codec = read_codec_configs(system)
    carried = system / "carried" / "codec"
    (folder / "flow").mkdir(exist_ok=True)
    notes: dict[str, Any] = {}
    if carried.is_dir():
        carry_files(carried, folder, within=system)
        notes = read_json(system / NOTES)
    else:
        write_json(folder / "config.json", released_tokenizer_config(codec.tokenizer))
        mel = {"feature_size": codec.tokenizer.num_mel_bins, "sampling_rate": codec.tokenizer.sample_rate}
        mel |= {"n_fft": codec.tokenizer.n_fft, "hop_length": codec.tokenizer.hop_length}
        write_json(folder / "preprocessor_config.json", {"feature_extractor_type": "WhisperFeatureExtractor"} | mel)
        (folder / "flow" / "config.yaml").write_text(released_yaml(codec.decoder.flow, codec.decoder.vocoder))
    tokenizer = _export_part(
        system, "speech_tokenizer", "model", tokenizer_table.table(codec.tokenizer), encoder_shapes(codec.tokenizer)
    )
    write_source(tokenizer, folder, metadata={"format": "pt"}, say=say)
    flow = codec.decoder.flow
    table = flow_table.table(flow)
    shapes = flow_shapes(flow)
    for chunk in (None, *codec.decoder.chunks):
        file = "flow.pt" if chunk is None else f"flow-chunk-{chunk}.pt"
        source = _export_part(system, "speech_decoder", flow_stem(chunk), table, shapes)
        write_torch(folder / "flow" / file, source, notes.get(file, {}).get("extras", {}))
        say(f"flow/{file}: done")
    vocoder = codec.decoder.vocoder
    note = notes.get("hift.pt", {})
    spelling = vocoder_table.Spelling(**note.get("spelling", {}))
    source = _export_part(
        system, "speech_decoder", "vocoder", vocoder_table.table(vocoder, spelling), vocoder_shapes(vocoder)
    )
    write_torch(folder / "flow" / "hift.pt", source, note.get("extras", {}))
    speaker = codec.decoder.speaker
    if speaker is None:
        raise MossError(f"{system}: has no speaker network, but the released layout has campplus.onnx")
    source = _export_part(system, "speech_decoder", "speaker", speaker_table.table(speaker), speaker_shapes(speaker))
    onnx = folder / "flow" / "campplus.onnx"
    if onnx.is_file():
        SpeakerGraph(onnx).write(onnx, source)
    else:
        write_speaker_graph(onnx, source, speaker)


def read_codec_configs(system: Path) -> Codec:
    """The configs of the codec in a system folder, read strictly."""
    paths = [system / name / "config.json" for name in ("speech_tokenizer", "speech_decoder")]
    tokenizer, decoder = (
        read_config(cls, read_json(path), str(path))
        for cls, path in zip((SpeechTokenizerConfig, SpeechDecoderConfig), paths, strict=True)
    )
    return Codec(tokenizer, decoder)


def _import_part(
    source: TensorSource, table: NameTable, shapes: Mapping[str, Any], system: Path, stem: str, say: Say
) -> None:
    unused = system / "carried" / "unused" / f"{stem}.safetensors"
    import_tensors(source, table, shapes, system / "speech_decoder", stem, unused, say, shard_bytes=1 << 62)
    say(f"{stem.replace('_', ' ')}: done")


def _export_part(system: Path, room: str, stem: str, table: NameTable, shapes: Mapping[str, Any]) -> TensorSource:
    part = exported_tensors(open_tensors(system / room / f"{stem}.safetensors"), table, shapes)
    unused = system / "carried" / "unused" / f"{room if stem == 'model' else stem}.safetensors"
    return MergedTensors(part, open_tensors(unused)) if unused.is_file() else part


def _chunks(folder: Path) -> list[int]:
    found = (CHUNK_FILE.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _check_extras(extras: dict[str, Any], table: NameTable, path: Path) -> None:
    if unknown := [name for name in extras if not (table.is_carried(name) or name in ("epoch", "step"))]:
        lines = [f"unmapped: {name} = {extras[name]!r}" for name in unknown]
        raise MossError("\n  ".join([f"{path}: entries that no rule carries", *lines]))

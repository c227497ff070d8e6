"""Describes the contents of a system folder or a released folder, and the origin of our name tables."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.checkpoint import open_tensors
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SystemFolder
from moss_jax.components import check_codes
from moss_jax.convert.codec import read_codec_configs
from moss_jax.convert.files import require_folder
from moss_jax.convert.language_model import read_speech_lm_config, tokenizer_size
from moss_jax.convert.onnx_speaker import SpeakerGraph
from moss_jax.convert.stream import tensor_shapes
from moss_jax.convert.table import PLACEHOLDER, NameTable
from moss_jax.convert.tables import flow as flow_table
from moss_jax.convert.tables import qwen3 as qwen3_table
from moss_jax.convert.tables import speaker as speaker_table
from moss_jax.convert.tables import speech_lm as speech_lm_table
from moss_jax.convert.tables import speech_tokenizer as tokenizer_table
from moss_jax.convert.tables import vocoder as vocoder_table
from moss_jax.convert.torch_file import read_torch
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.speech_decoder.config import RELEASED
from moss_jax.speech_lm.config import MOSS_SPEECH_8B, QWEN3_8B
from moss_jax.speech_tokenizer.config import MOSS_SPEECH_CODEC

ORIGIN_HEADING = "The released files were not available to this project. TableOrigin of the tensor names in its tables:"


@dataclass(frozen=True)
class TableOrigin:
    """A name table and where its names come from; `verified`: they were seen in a real file."""

    part: str
    table: NameTable
    source: str
    verified: bool = False


def origins() -> list[TableOrigin]:
    """The name tables at the released sizes."""
    assert RELEASED.speaker is not None, "the released decoder has a speaker network"
    old_spelling = vocoder_table.Spelling("", "weight_g", "weight_v")
    printed = "printed from the reference class; the file was not seen"
    return [
        TableOrigin("language model", speech_lm_table.table(MOSS_SPEECH_8B), "reported by a port that ran it", True),
        TableOrigin(
            "speech tokenizer", tokenizer_table.table(MOSS_SPEECH_CODEC), "of a public class; the file was not seen"
        ),
        TableOrigin("flow", flow_table.table(RELEASED.flow), printed),
        TableOrigin("vocoder", vocoder_table.table(RELEASED.vocoder), printed),
        TableOrigin("vocoder, older spelling", vocoder_table.table(RELEASED.vocoder, old_spelling), printed),
        TableOrigin(
            "speaker network",
            speaker_table.table(RELEASED.speaker),
            "of the PyTorch module; the ONNX file was not seen",
        ),
        TableOrigin("Qwen3", qwen3_table.table(QWEN3_8B), "published with the model", True),
    ]


def describe(folder: str | Path, names: bool = False) -> Iterator[str]:
    """Yields lines that describe a system folder or a released folder.

    Args:
        names: also list the name patterns that were not seen in a real file.

    Raises:
        MossError: the folder is neither of the two, or a file in it cannot be read.
    """
    folder = require_folder(folder, "a system folder or a released folder")
    seen: dict[str, set[str]] = {}
    if (folder / SYSTEM_FILE).is_file():
        yield from _describe_system(SystemFolder(folder).path)
    elif (folder / "config.json").is_file():
        yield from _describe_release(folder, seen)
    else:
        raise MossError(f"{folder}: neither a system folder ({SYSTEM_FILE}) nor a released one (config.json)")
    yield ""
    yield from _describe_origins(seen, names)


def _describe_system(folder: Path) -> Iterator[str]:
    voices = sorted(path.stem for path in (folder / "voices").glob("*.safetensors"))
    yield f"{folder}: a moss_jax system"
    yield ""
    yield _row("part", "tensors", "parameters", "size", "dtype")
    for component in ("transformer", "speech_tokenizer", "speech_decoder"):
        for path in (
            sorted((folder / component).glob("*.safetensors"))
            if component == "speech_decoder"
            else [folder / component]
        ):
            if path.exists():
                name = component if path.name == component else f"{component}/{path.stem}"
                yield _tensors_row(name, open_tensors(path).tensors)
    yield ""
    if (folder / "transformer").is_dir():
        lm = read_speech_lm_config(folder)
        yield (
            f"transformer: {lm.num_shared_layers} shared + 2 x {lm.num_modality_layers} layers, "
            f"width {lm.hidden_size}, {lm.text_vocab_size} text ids, {lm.eosp_id} codes, "
            f"{lm.max_position_embeddings} positions"
        )
    if (folder / "speech_decoder").is_dir():
        codec = read_codec_configs(folder)
        chunks = ", ".join(map(str, codec.decoder.chunks)) or "none"
        yield f"codec: {codec.tokenizer.code_rate:g} codes a second, {codec.decoder.sample_rate} Hz out"
        yield f"streaming flows: for chunks of {chunks} codes"
    else:
        yield "codec: none; this system has text input and output only"
    if (tokenizer := folder / "text_tokenizer" / "tokenizer.json").is_file():
        yield f"text tokenizer: {tokenizer_size(tokenizer)} ids"
    default = read_json(folder / SYSTEM_FILE).get("default_voice")
    yield f"voices: {', '.join(voices) or 'none'}; default: {default or 'the zero voice'}"
    carried = [path for path in (folder / "carried").rglob("*") if path.is_file()]
    if carried:
        yield f"kept for an export: {len(carried)} files, {_size(sum(p.stat().st_size for p in carried))}"
    check_codes(SystemFolder(folder))


def _describe_release(folder: Path, seen: dict[str, set[str]]) -> Iterator[str]:
    yield f"{folder}: a released folder"
    yield ""
    yield _row("file", "tensors", "parameters", "size", "dtype")
    codec = (folder / "flow").is_dir()
    kind = read_json(folder / "config.json").get("model_type")
    part = "speech tokenizer" if codec else "Qwen3" if kind == "qwen3" else "language model"
    reader = open_tensors(folder)
    seen[part] = set(reader.tensors)
    yield _tensors_row(reader.path.name, reader.tensors)
    for path in sorted((folder / "flow").glob("*.pt")):
        tensors = read_torch(path)[0].tensors
        if path.name != "hift.pt":
            part = "flow"
        else:
            part = "vocoder" if vocoder_table.spelling(tensors).v != "weight_v" else "vocoder, older spelling"
        seen.setdefault(part, set()).update(tensors)
        yield _tensors_row(f"flow/{path.name}", tensors)
    if (onnx := folder / "flow" / "campplus.onnx").is_file():
        graph = SpeakerGraph(onnx)
        seen["speaker network"] = set(graph.stored_names.values()) & set(tensor_shapes(graph.tensors()))
        yield _tensors_row("flow/campplus.onnx", graph.tensors().tensors)
        if graph.folded:
            yield f"  ({len(graph.folded)} batch normalisations are folded into convolutions)"


def _describe_origins(seen: Mapping[str, set[str]], names: bool) -> Iterator[str]:
    yield ORIGIN_HEADING
    for origin in origins():
        # A projection before the codebook exists only in small models of this project, in no release.
        patterns = dict.fromkeys(map(_short, (r.name for r in origin.table.rows if ".project." not in r.name)))
        matched = [p for p in patterns if any(_pattern_fits(p, name) for name in seen.get(origin.part, ()))]
        here = f"; in this folder: {len(matched)} of {len(patterns)} patterns" if origin.part in seen else ""
        yield f"  {origin.part}: {origin.source}{here}"
        if names and not origin.verified:
            yield from (f"    not seen: {pattern}" for pattern in patterns if pattern not in matched)
            yield from (f"    kept if present: {pattern}" for pattern in origin.table.carried)
    if not names:
        yield "`--names` lists the names that were not seen in a real file."


def _short(name: str) -> str:
    """The pattern of a name; the layers that the speaker network numbers individually become one pattern."""
    return re.sub(r"xvector\.(block|transit)\d+", r"xvector.\1{block}", re.sub(r"tdnnd\d+", "tdnnd{layer}", name))


def _pattern_fits(pattern: str, name: str) -> bool:
    """Whether a tensor name matches a pattern with placeholders."""
    parts = PLACEHOLDER.split(pattern)
    return bool(re.fullmatch("".join(re.escape(p) if i % 2 == 0 else r"\w+" for i, p in enumerate(parts)), name))


def _tensors_row(name: str, tensors: Mapping[str, Any]) -> str:
    counts = [int(np.prod(t.shape, dtype=np.int64)) for t in tensors.values()]
    size = sum(n * np.dtype(t.dtype).itemsize for n, t in zip(counts, tensors.values(), strict=True))
    dtypes = ", ".join(sorted({str(np.dtype(t.dtype)) for t in tensors.values()}))
    return _row(name, len(counts), f"{sum(counts):,}", _size(size), dtypes)


def _row(*cells: Any) -> str:
    return "{:<34} {:>8} {:>15} {:>10}  {}".format(*cells)


def _size(count: int) -> str:
    """A number of bytes with a unit."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"

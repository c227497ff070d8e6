"""What is inside a system folder or a released folder, and which names of our tables a real file has shown."""

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
from moss_jax.convert.language_model import read_transformer_config, tokenizer_size
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

HONEST = "No one here has opened the released files. Where the names of our tables come from:"


@dataclass(frozen=True)
class Origin:
    """A name table and how far its names can be trusted."""

    part: str
    table: NameTable
    source: str
    verified: bool = False


def origins() -> list[Origin]:
    """The tables at the released sizes."""
    old = vocoder_table.Spelling("", "weight_g", "weight_v")
    classes = "printed from the reference class; the file itself never seen"
    tables = (
        ("language model", speech_lm_table.table(MOSS_SPEECH_8B), "reported by a port that ran it", True),
        (
            "speech tokenizer",
            tokenizer_table.table(MOSS_SPEECH_CODEC),
            "of a public class; the file never seen",
            False,
        ),
        ("flow", flow_table.table(RELEASED.flow), classes, False),
        ("vocoder", vocoder_table.table(RELEASED.vocoder), classes, False),
        ("vocoder, older spelling", vocoder_table.table(RELEASED.vocoder, old), classes, False),
        (
            "speaker network",
            speaker_table.table(RELEASED.speaker),
            "of the PyTorch module; ONNX never seen",
            False,
        ),
        ("Qwen3", qwen3_table.table(QWEN3_8B), "published with the model", True),
    )
    return [Origin(*row) for row in tables]


def describe(folder: str | Path, names: bool = False) -> Iterator[str]:
    """Lines about a system folder or a released folder; with `names` every name pattern that no real file has shown.

    Raises:
        MossError: neither of the two, or a file in it cannot be read.
    """
    folder = require_folder(folder, "a system folder or a released folder")
    seen: dict[str, set[str]] = {}
    if (folder / SYSTEM_FILE).is_file():
        yield from _system(SystemFolder(folder).path)
    elif (folder / "config.json").is_file():
        yield from _released(folder, seen)
    else:
        raise MossError(f"{folder}: neither a system folder ({SYSTEM_FILE}) nor a released one (config.json)")
    yield ""
    yield from _provenance(seen, names)


def _system(folder: Path) -> Iterator[str]:
    voices = sorted(path.stem for path in (folder / "voices").glob("*.safetensors"))
    yield f"{folder}: a moss_jax system"
    yield ""
    yield _row("part", "tensors", "parameters", "size", "dtype")
    for room in ("transformer", "speech_tokenizer", "speech_decoder"):
        for path in sorted((folder / room).glob("*.safetensors")) if room == "speech_decoder" else [folder / room]:
            if path.exists():
                name = room if path.name == room else f"{room}/{path.stem}"
                yield _tensors_row(name, open_tensors(path).tensors)
    yield ""
    if (folder / "transformer").is_dir():
        lm = read_transformer_config(folder)
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
        yield "codec: none; this system cannot hear or speak"
    if (tokenizer := folder / "text_tokenizer" / "tokenizer.json").is_file():
        yield f"text tokenizer: {tokenizer_size(tokenizer)} ids"
    default = read_json(folder / SYSTEM_FILE).get("default_voice")
    yield f"voices: {', '.join(voices) or 'none'}; default: {default or 'the zero voice'}"
    carried = [path for path in (folder / "carried").rglob("*") if path.is_file()]
    if carried:
        yield f"carried for an export, unused: {len(carried)} files, {_size(sum(p.stat().st_size for p in carried))}"
    check_codes(SystemFolder(folder))


def _released(folder: Path, seen: dict[str, set[str]]) -> Iterator[str]:
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
        seen["speaker network"] = set(graph.places.values()) & set(tensor_shapes(graph.tensors()))
        yield _tensors_row("flow/campplus.onnx", graph.tensors().tensors)
        if graph.folded:
            yield f"  ({len(graph.folded)} batch normalisations are folded into convolutions)"


def _provenance(seen: Mapping[str, set[str]], names: bool) -> Iterator[str]:
    yield HONEST
    for origin in origins():
        # A projection before the codebook is for small models of our own; no release has it.
        patterns = dict.fromkeys(map(_short, (r.name for r in origin.table.rows if ".project." not in r.name)))
        found = [p for p in patterns if any(_pattern_fits(p, name) for name in seen.get(origin.part, ()))]
        here = f"; in this folder: {len(found)} of {len(patterns)} patterns" if origin.part in seen else ""
        yield f"  {origin.part}: {origin.source}{here}"
        if names and not origin.verified:
            yield from (f"    never seen: {pattern}" for pattern in patterns if pattern not in found)
            yield from (f"    carried if there: {pattern}" for pattern in origin.table.carried)
    if not names:
        yield "`--names` lists every name that no real file has shown."


def _short(name: str) -> str:
    """Layers that the speaker network numbers one by one, as one pattern."""
    return re.sub(r"xvector\.(block|transit)\d+", r"xvector.\1{block}", re.sub(r"tdnnd\d+", "tdnnd{layer}", name))


def _pattern_fits(pattern: str, name: str) -> bool:
    parts = PLACEHOLDER.split(pattern)
    return bool(re.fullmatch("".join(re.escape(p) if i % 2 == 0 else r"\w+" for i, p in enumerate(parts)), name))


def _tensors_row(name: str, tensors: Mapping[str, Any]) -> str:
    counts = [int(np.prod(t.shape, dtype=np.int64)) for t in tensors.values()]
    size = sum(n * np.dtype(t.dtype).itemsize for n, t in zip(counts, tensors.values(), strict=True))
    dtypes = ", ".join(sorted({str(np.dtype(t.dtype)) for t in tensors.values()}))
    return _row(name, len(counts), f"{sum(counts):,}", _size(size), dtypes)


def _row(*cells: Any) -> str:
    return "{:<34} {:>8} {:>15} {:>10}  {}".format(*cells)


def _size(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"

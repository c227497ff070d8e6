"""Plain Qwen3 checkpoints: a layer-split model from one, and the text path of a layer-split model back to one.

The rows of the text table that the layer-split model drops (padding behind the text tokenizer's last id) are carried,
so that an export of the text path has every tensor of the original again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_jax.checkpoint import TensorReader, TensorWriter, open_tensors, save_tensors
from moss_jax.checkpoint.config_io import MAX_LAYERS, MAX_SIZE, read_config, within, write_config
from moss_jax.checkpoint.safetensors import TensorInfo
from moss_jax.convert.files import carry_files, copy_file, files_to_carry, require_folder, update_json, write_json
from moss_jax.convert.language_model import (
    check_special,
    compute_dtypes,
    copy_text_tokenizer,
    read_transformer_config,
    special_ids,
    tokenizer_size,
)
from moss_jax.convert.layer_split import default_modality_layers, new_audio_tables, qwen3_config, split_parameter
from moss_jax.convert.stream import CopyProgress, Say, tensor_shapes, with_dtypes, write_source
from moss_jax.convert.table import TableEntry
from moss_jax.convert.tables.qwen3 import table
from moss_jax.documents import read_json, shown
from moss_jax.errors import MossError
from moss_jax.speech_lm import model_shapes
from moss_jax.speech_lm.config import DTYPES, SpeechLMConfig

SAME_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
    "rms_norm_eps",
    "max_position_embeddings",
)
AUDIO_BRANCH = ("copy", "random")
RELEASED_CODES = 16384  # of the released codec
ROW_BLOCK = 128  # vocabularies are padded to a multiple of this
DROPPED = "dropped_rows.safetensors"
HEAD = "text/head/kernel"
EMBED = "text/embed/embedding"
ROWS = {EMBED: "model.embed_tokens.weight", HEAD: "lm_head.weight"}


@dataclass(frozen=True)
class Qwen3Config:
    """The keys of a Qwen3's config.json that are used."""

    hidden_size: int = within(1, MAX_SIZE)
    intermediate_size: int = within(1, MAX_SIZE)
    num_attention_heads: int = within(1, MAX_SIZE)
    num_key_value_heads: int = within(1, MAX_SIZE)
    num_hidden_layers: int = within(1, MAX_LAYERS)
    vocab_size: int = within(1, MAX_SIZE)
    rope_theta: float = within(1, 1e12)
    rms_norm_eps: float = within(0, 1)
    max_position_embeddings: int = within(1, MAX_SIZE)
    head_dim: int | None = within(2, MAX_SIZE, None)


def import_qwen3(
    folder: str | Path,
    system: Path,
    modality_layers: int | None = None,
    codes: int = RELEASED_CODES,
    audio_branch: str = "copy",
    seed: int = 0,
    say: Say = lambda line: None,
) -> SpeechLMConfig:
    """Writes `transformer/`, `text_tokenizer/` and `carried/qwen3/` of a system from a Qwen3 of any size.

    Args:
        folder: config.json, safetensors, tokenizer.json; tied or not.
        system: the folder to write into.
        modality_layers: how many of the last layers become the text branch and, copied, the audio branch; None: a
            ninth of them; 0: none, the model is not split.
        codes: of the speech tokenizer; the audio vocabulary is these and the end of speech, padded.
        audio_branch: "copy" of the text branch, or "random" (for comparison).
        seed: of the new audio table and head, and of a random branch.
    """
    if audio_branch not in AUDIO_BRANCH:
        raise MossError(f"audio branch {audio_branch!r}: unknown, there are {', '.join(AUDIO_BRANCH)}")
    folder = require_folder(folder, "a Qwen3 checkpoint (config.json, *.safetensors, tokenizer.json)")
    reader = open_tensors(folder)
    special = special_ids(folder / "tokenizer.json")
    files_to_carry(folder, reader.files())  # reports links that are not followed before the long work
    config, vocab = split_config(folder, special, modality_layers, codes)
    config = replace(config, **compute_dtypes(reader))
    source = qwen3_config(config, vocab)
    shapes = dict(model_shapes(source))
    tied = "lm_head.weight" not in reader.tensors and bool(read_json(folder / "config.json").get("tie_word_embeddings"))
    if tied:
        del shapes[HEAD]
    rows = table(source)
    rows.check(tensor_shapes(reader), shapes, str(reader.path))
    entries = rows.entries(shapes)
    dtypes = with_dtypes(reader, entries)

    def parts(path: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        for name, part in split_parameter(path, value, config, tied):
            if audio_branch == "copy" or not name.startswith("audio/layers/"):
                yield name, part
            else:
                yield name, _random(part, f"{seed} {name}")

    announced = {}
    for entry in entries:
        empty = np.broadcast_to(np.zeros((), dtypes[entry.path].dtype), entry.shape)
        for name, part in split_parameter(entry.path, empty, config, tied):
            announced[name] = jax.ShapeDtypeStruct(part.shape, part.dtype)
    dtype = dtypes[EMBED].dtype
    tables = {name: value.astype(dtype) for name, value in new_audio_tables(config, seed)}
    announced |= {name: jax.ShapeDtypeStruct(value.shape, dtype) for name, value in tables.items()}
    target = system / "transformer"
    target.mkdir(parents=True)
    dropped = {}
    progress = CopyProgress(say, "writing model", announced)
    with TensorWriter(target, announced) as writer:
        for entry in entries:
            value = entry.to_ours(reader.read)
            if entry.path in ROWS and vocab > config.text_vocab_size:
                whole = value if entry.path == EMBED else value.T
                dropped[ROWS[entry.path]] = np.array(whole[config.text_vocab_size :])
            for name, part in parts(entry.path, value):
                writer.write(name, part)
                progress.add(announced[name])
        for name, value in tables.items():
            writer.write(name, value)
    write_json(target / "config.json", write_config(config))
    copy_text_tokenizer(folder, system)
    carried = system / "carried" / "qwen3"
    carry_files(folder, carried, reader.files())
    if dropped:
        save_tensors(carried / DROPPED, dropped)
    return config


def export_qwen3(system: str | Path, folder: Path, say: Say = lambda line: None) -> None:
    """Writes the text path (text table, shared block, text branch, text head) as a plain Qwen3 into a folder."""
    system = Path(system)
    config = read_transformer_config(system)
    carried = system / "carried" / "qwen3"
    ours = open_tensors(system / "transformer")
    rows = open_tensors(carried / DROPPED) if (carried / DROPPED).exists() else None
    tied = False
    if carried.is_dir():
        carry_files(carried, folder, [carried / DROPPED], within=system)
        tied = bool(read_json(carried / "config.json").get("tie_word_embeddings"))
        if tied and not np.array_equal(ours.read(EMBED).view(np.uint8), _bytes(ours.read(HEAD).T)):
            say("note: the text table and head are no longer equal; the Qwen3 is written untied")
            tied = False
    else:
        copy_file(system / "text_tokenizer" / "tokenizer.json", folder / "tokenizer.json", within=system)
    source = TextPath(ours, config, rows, tied)
    values = {key: getattr(config, key) for key in (*SAME_KEYS, "head_dim")} | {
        "vocab_size": source.vocab_size,
        "num_hidden_layers": config.num_shared_layers + config.num_modality_layers,
        "tie_word_embeddings": tied,
    }
    if carried.is_dir():
        original = {"head_dim": config.head_dim, "tie_word_embeddings": False} | qwen3_keys(folder / "config.json")
        values = {key: value for key, value in values.items() if original[key] != value}
        dtypes = {str(tensor.dtype) for tensor in source.tensors.values()}
        for key in ("dtype", "torch_dtype"):
            if original.get(key) in DTYPES and original[key] not in dtypes:
                values[key] = "float32" if len(dtypes) > 1 else dtypes.pop()
                break
        if values:
            update_json(folder / "config.json", values)
    else:
        fixed = {"hidden_act": "silu", "attention_bias": False, "torch_dtype": config.param_dtype}
        kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        write_json(folder / "config.json", kind | values | fixed)
    write_source(source, folder, metadata={"format": "pt"}, say=say)


def qwen3_keys(path: Path) -> dict[str, Any]:
    """A Qwen3 config.json, checked: everything needed is there, nothing asks for another model."""
    data = read_json(path)
    rope = data.get("rope_parameters") or {}  # where newer transformers write it
    if not isinstance(rope, dict):
        raise MossError(f"{path}: rope_parameters is {shown(rope)}, expected an object")
    data = {"rope_theta": rope["rope_theta"]} | data if "rope_theta" in rope else data
    read_config(Qwen3Config, data, path, foreign=True)
    fixed = {"model_type": "qwen3", "attention_bias": False, "rope_scaling": None, "hidden_act": "silu"}
    for key, expected in fixed.items():
        if (found := data.get(key, expected)) != expected:
            raise MossError(f"{path}: config has {key} = {shown(found)}, expected {expected!r} (a plain Qwen3)")
    if rope.get("rope_type", "default") != "default":
        raise MossError(
            f"{path}: config has rope_type = {shown(rope['rope_type'])}, expected 'default' (a plain Qwen3)"
        )
    return data


class TextPath:
    """The text path of our file as a source of Qwen3 tensors, each layer from the block it lies in.

    The dtypes of our file are kept, and padding rows get that of their table. Only where the shared block and the text
    branch differ, as after training with a frozen part in fewer bits, everything is float32: a Qwen3 has one dtype.
    """

    def __init__(self, ours: TensorReader, config: SpeechLMConfig, rows: TensorReader | None, tied: bool):
        self.path = ours.path
        self._ours = ours
        self._config = config
        self._rows = rows
        self.vocab_size = config.text_vocab_size + self._extra_rows()
        source = qwen3_config(config, self.vocab_size)
        shapes = dict(model_shapes(source))
        if tied:
            del shapes[HEAD]
        expected = model_shapes(config)
        if lost := [path for path in expected if path not in ours.tensors]:
            raise MossError("\n  ".join([f"{ours.path}: parameters are missing", *lost]))
        self.tensors = {}
        self._places = {}
        entries = table(source).entries(shapes)
        dtypes = {entry.path: self._dtypes(entry) for entry in entries}
        mixed = any(len(found) > 1 for found in dtypes.values())
        for entry in entries:
            dtype = np.dtype(np.float32) if mixed else dtypes[entry.path].pop()
            for index in np.ndindex(entry.names.shape):
                self.tensors[str(entry.names[index])] = TensorInfo(ours.path, entry.source_shape, dtype, 0)
                self._places[str(entry.names[index])] = (entry, index)

    def read(self, name: str) -> np.ndarray:
        entry, index = self._places[name]
        value = entry.transform.to_theirs(self._value(entry, index))
        return np.ascontiguousarray(value, self.tensors[name].dtype)

    def _value(self, entry: TableEntry, index: tuple[int, ...]) -> np.ndarray:
        if index:
            depth = index[0]
            shared = self._config.num_shared_layers
            path = entry.path if depth >= shared else entry.path.replace("text/", "shared/", 1)
            return self._ours.read(path)[depth - shared if depth >= shared else depth]
        value = self._ours.read(entry.path)
        if entry.path in ROWS and self._rows is not None:
            # Where table and head were one tensor, only the table's rows are kept.
            name = ROWS[entry.path] if ROWS[entry.path] in self._rows.tensors else ROWS[EMBED]
            more = self._rows.read(name).astype(value.dtype)
            return np.concatenate(
                [value, more] if entry.path == EMBED else [value, more.T], 0 if entry.path == EMBED else 1
            )
        return value

    def _dtypes(self, entry: TableEntry) -> set[np.dtype]:
        """Of one kind of parameter in the blocks that have it."""
        paths = (entry.path, entry.path.replace("text/layers/", "shared/layers/", 1))
        return {np.dtype(self._ours.tensors[path].dtype) for path in paths if path in self._ours.tensors}

    def _extra_rows(self) -> int:
        if self._rows is None:
            return 0
        shapes = {name: tuple(tensor.shape) for name, tensor in self._rows.tensors.items()}
        table_rows = shapes.get(ROWS[EMBED], ())
        width = self._config.hidden_size
        if len(table_rows) != 2 or any(shape != (table_rows[0], width) for shape in shapes.values()):
            raise MossError(f"{self._rows.path}: padding rows of shapes {shapes}, expected {width} columns each")
        return table_rows[0]


def split_config(
    folder: Path, special: Mapping[str, int], modality_layers: int | None, codes: int
) -> tuple[SpeechLMConfig, int]:
    """The layer-split config and the vocabulary size of the Qwen3."""
    where = folder / "config.json"
    released = qwen3_keys(where)
    depth = released["num_hidden_layers"]
    vocab = released["vocab_size"]
    branch = default_modality_layers(depth) if modality_layers is None else modality_layers
    if not 0 <= branch < depth:
        raise MossError(f"{where}: {branch} layers for each branch, expected 0 to {depth - 1} of the {depth} there are")
    sizes = {key: released[key] for key in SAME_KEYS}
    config = SpeechLMConfig(
        **sizes,
        head_dim=released.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"],
        num_shared_layers=depth - branch,
        num_modality_layers=branch,
        text_vocab_size=min(vocab, _padded(tokenizer_size(folder / "tokenizer.json"))),
        audio_vocab_size=_padded(codes + 1),
        eosp_id=codes,
        audio_pad_id=min(512, codes - 1),
        **special,
    )
    check_special(config, special, folder)
    return config, vocab


def _padded(size: int) -> int:
    return -(-size // ROW_BLOCK) * ROW_BLOCK


def _random(part: np.ndarray, seed: str) -> np.ndarray:
    if part.ndim == 2:  # the scale of a norm, stacked
        return np.ones_like(part)
    rng = np.random.default_rng(list(seed.encode()))
    return np.stack([0.02 * rng.standard_normal(part.shape[1:], np.float32) for _ in part]).astype(part.dtype)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)

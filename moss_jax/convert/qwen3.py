"""Import of a plain Qwen3 as a layer-split model, and export of the text path of a layer-split model as a Qwen3.

The layer-split model drops rows of the text embedding: padding after the last id of the text tokenizer. They are kept
in the system, so that an export of the text path restores every tensor of the original.
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
    check_special_ids,
    compute_dtypes,
    copy_text_tokenizer,
    read_speech_lm_config,
    special_ids,
    tokenizer_size,
)
from moss_jax.convert.layer_split import default_modality_layers, new_audio_tables, qwen3_config, split_parameter
from moss_jax.convert.stream import CopyProgress, tensor_shapes, with_dtypes, write_source
from moss_jax.convert.table import TableEntry
from moss_jax.convert.tables.qwen3 import table
from moss_jax.documents import read_json, shown
from moss_jax.errors import MossError
from moss_jax.progress import Say
from moss_jax.speech_lm import model_shapes
from moss_jax.speech_lm.config import DTYPES, SpeechLMConfig

SAME_KEYS = (  # fields of our config with the same name in a Qwen3's config.json
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
    "rms_norm_eps",
    "max_position_embeddings",
)
AUDIO_BRANCH_STARTS = ("copy", "random")
RELEASED_CODES = 16384  # number of speech codes of the released codec
VOCAB_MULTIPLE = 128  # vocabularies are padded to a multiple of this
DROPPED_ROWS_FILE = "dropped_rows.safetensors"
TEXT_HEAD = "text/head/kernel"
TEXT_EMBED = "text/embed/embedding"
VOCAB_TENSORS = {TEXT_EMBED: "model.embed_tokens.weight", TEXT_HEAD: "lm_head.weight"}


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
        folder: with config.json, *.safetensors and tokenizer.json; the embedding may be tied to the head.
        system: folder to write into.
        modality_layers: number of upper layers that become the text branch and, as a copy, the audio branch; None: a
            ninth of the layers; 0: the model is not split.
        codes: number of speech codes; the audio vocabulary is these and the end of speech, padded.
        audio_branch: one of AUDIO_BRANCH_STARTS: a copy of the text branch, or random weights for comparison.
        seed: of the new audio embedding and head, and of a random branch.
    """
    if audio_branch not in AUDIO_BRANCH_STARTS:
        raise MossError(f"audio branch is {audio_branch!r}, expected one of {', '.join(AUDIO_BRANCH_STARTS)}")
    folder = require_folder(folder, "a Qwen3 checkpoint (config.json, *.safetensors, tokenizer.json)")
    reader = open_tensors(folder)
    special = special_ids(folder / "tokenizer.json")
    files_to_carry(folder, reader.files())  # raises for bad links before the long work
    config, vocab = split_config(folder, special, modality_layers, codes)
    config = replace(config, **compute_dtypes(reader))
    source = qwen3_config(config, vocab)
    shapes = dict(model_shapes(source))
    tied = "lm_head.weight" not in reader.tensors and bool(read_json(folder / "config.json").get("tie_word_embeddings"))
    if tied:
        del shapes[TEXT_HEAD]
    rows = table(source)
    rows.check(tensor_shapes(reader), shapes, str(reader.path))
    entries = rows.entries(shapes)
    dtypes = with_dtypes(reader, entries)

    def split(path: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        for name, part in split_parameter(path, value, config, tied):
            if audio_branch == "copy" or not name.startswith("audio/layers/"):
                yield name, part
            else:
                yield name, _random_like(part, f"{seed} {name}")

    # The writer needs all shapes before the first value: split arrays that take no memory.
    out_shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for entry in entries:
        empty = np.broadcast_to(np.zeros((), dtypes[entry.path].dtype), entry.shape)
        for name, part in split_parameter(entry.path, empty, config, tied):
            out_shapes[name] = jax.ShapeDtypeStruct(part.shape, part.dtype)
    embed_dtype = dtypes[TEXT_EMBED].dtype
    audio_tables = {name: value.astype(embed_dtype) for name, value in new_audio_tables(config, seed)}
    for name, value in audio_tables.items():
        out_shapes[name] = jax.ShapeDtypeStruct(value.shape, embed_dtype)
    target = system / "transformer"
    target.mkdir(parents=True)
    dropped: dict[str, np.ndarray] = {}
    progress = CopyProgress(say, "writing model", out_shapes)
    with TensorWriter(target, out_shapes) as writer:
        for entry in entries:
            value = entry.to_ours(reader.read)
            if entry.path in VOCAB_TENSORS and vocab > config.text_vocab_size:
                vocab_first = value if entry.path == TEXT_EMBED else value.T
                dropped[VOCAB_TENSORS[entry.path]] = np.array(vocab_first[config.text_vocab_size :])
            for name, part in split(entry.path, value):
                writer.write(name, part)
                progress.add(out_shapes[name])
        for name, value in audio_tables.items():
            writer.write(name, value)
    write_json(target / "config.json", write_config(config))
    copy_text_tokenizer(folder, system)
    carried = system / "carried" / "qwen3"
    carry_files(folder, carried, reader.files())
    if dropped:
        save_tensors(carried / DROPPED_ROWS_FILE, dropped)
    return config


def export_qwen3(system: str | Path, folder: Path, say: Say = lambda line: None) -> None:
    """Writes the text path (text embedding, shared block, text branch, text head) as a plain Qwen3 into a folder."""
    system = Path(system)
    config = read_speech_lm_config(system)
    carried = system / "carried" / "qwen3"
    ours = open_tensors(system / "transformer")
    dropped_rows = open_tensors(carried / DROPPED_ROWS_FILE) if (carried / DROPPED_ROWS_FILE).exists() else None
    tied = False
    if carried.is_dir():
        carry_files(carried, folder, [carried / DROPPED_ROWS_FILE], within=system)
        tied = bool(read_json(carried / "config.json").get("tie_word_embeddings"))
        if tied and not np.array_equal(ours.read(TEXT_EMBED).view(np.uint8), _bytes(ours.read(TEXT_HEAD).T)):
            say("note: the text embedding and head are no longer equal; the Qwen3 is written untied")
            tied = False
    else:
        copy_file(system / "text_tokenizer" / "tokenizer.json", folder / "tokenizer.json", within=system)
    source = TextPath(ours, config, dropped_rows, tied)
    values = {key: getattr(config, key) for key in (*SAME_KEYS, "head_dim")} | {
        "vocab_size": source.vocab_size,
        "num_hidden_layers": config.num_shared_layers + config.num_modality_layers,
        "tie_word_embeddings": tied,
    }
    if carried.is_dir():
        original = {"head_dim": config.head_dim, "tie_word_embeddings": False} | qwen3_keys(folder / "config.json")
        values = {key: value for key, value in values.items() if original[key] != value}
        dtypes = {str(tensor.dtype) for tensor in source.tensors.values()}
        # transformers has renamed the key: change the one that the file has, if it no longer fits.
        for key in ("dtype", "torch_dtype"):
            if original.get(key) in DTYPES and original[key] not in dtypes:
                values[key] = "float32" if len(dtypes) > 1 else dtypes.pop()
                break
        if values:
            update_json(folder / "config.json", values)
    else:
        architecture = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        constants = {"hidden_act": "silu", "attention_bias": False, "torch_dtype": config.param_dtype}
        write_json(folder / "config.json", architecture | values | constants)
    write_source(source, folder, metadata={"format": "pt"}, say=say)


def qwen3_keys(path: Path) -> dict[str, Any]:
    """The keys of a Qwen3's config.json. Raises MossError if keys are missing or describe another model."""
    data = read_json(path)
    rope = data.get("rope_parameters") or {}  # newer versions of transformers write rope_theta here
    if not isinstance(rope, dict):
        raise MossError(f"{path}: rope_parameters is {shown(rope)}, expected an object")
    data = {"rope_theta": rope["rope_theta"]} | data if "rope_theta" in rope else data
    read_config(Qwen3Config, data, path, foreign=True)
    fixed = {"model_type": "qwen3", "attention_bias": False, "rope_scaling": None, "hidden_act": "silu"}
    for key, expected in fixed.items():
        if (value := data.get(key, expected)) != expected:
            raise MossError(f"{path}: config has {key} = {shown(value)}, expected {expected!r} (a plain Qwen3)")
    if rope.get("rope_type", "default") != "default":
        raise MossError(
            f"{path}: config has rope_type = {shown(rope['rope_type'])}, expected 'default' (a plain Qwen3)"
        )
    return data


class TextPath:
    """The text path of our file as a source of Qwen3 tensors; each layer is read from the block that contains it.

    Dtypes are those of our file; padding rows get the dtype of their embedding. If the shared block and the text branch
    have different dtypes, as after training with a frozen part in bfloat16, all tensors are float32, because a Qwen3
    has one dtype.
    """

    def __init__(
        self, ours: TensorReader, config: SpeechLMConfig, dropped_rows: TensorReader | None, tied: bool
    ) -> None:
        self.path = ours.path
        self._ours = ours
        self._config = config
        self._dropped_rows = dropped_rows
        self.vocab_size = config.text_vocab_size + self._extra_rows()
        source = qwen3_config(config, self.vocab_size)
        shapes = dict(model_shapes(source))
        if tied:
            del shapes[TEXT_HEAD]
        expected = model_shapes(config)
        if missing := [path for path in expected if path not in ours.tensors]:
            raise MossError("\n  ".join([f"{ours.path}: parameters are missing", *missing]))
        self.tensors: dict[str, TensorInfo] = {}
        self._slices: dict[str, tuple[TableEntry, tuple[int, ...]]] = {}  # of a parameter, by tensor name
        entries = table(source).entries(shapes)
        dtypes = {entry.path: self._dtypes(entry) for entry in entries}
        mixed = any(len(values) > 1 for values in dtypes.values())
        for entry in entries:
            dtype = np.dtype(np.float32) if mixed else dtypes[entry.path].pop()
            for index in np.ndindex(entry.names.shape):
                name = str(entry.names[index])
                self.tensors[name] = TensorInfo(ours.path, entry.source_shape, dtype, 0)
                self._slices[name] = (entry, index)

    def read(self, name: str) -> np.ndarray:
        entry, index = self._slices[name]
        value = entry.transform.to_theirs(self._value(entry, index))
        return np.ascontiguousarray(value, self.tensors[name].dtype)

    def _value(self, entry: TableEntry, index: tuple[int, ...]) -> np.ndarray:
        """A parameter of the Qwen3 in our layout; `index` is that of its layer, or () outside the layers."""
        if index:
            (layer,) = index
            shared = self._config.num_shared_layers
            if layer < shared:
                return self._ours.read(entry.path.replace("text/", "shared/", 1))[layer]
            return self._ours.read(entry.path)[layer - shared]
        value = self._ours.read(entry.path)
        if entry.path not in VOCAB_TENSORS or self._dropped_rows is None:
            return value
        # If embedding and head were one tensor, only the rows of the embedding were kept.
        name = VOCAB_TENSORS[entry.path]
        if name not in self._dropped_rows.tensors:
            name = VOCAB_TENSORS[TEXT_EMBED]
        padding = self._dropped_rows.read(name).astype(value.dtype)
        if entry.path == TEXT_EMBED:
            return np.concatenate([value, padding], axis=0)
        return np.concatenate([value, padding.T], axis=1)

    def _dtypes(self, entry: TableEntry) -> set[np.dtype]:
        """The dtypes of a parameter in the text branch and in the shared block."""
        paths = (entry.path, entry.path.replace("text/layers/", "shared/layers/", 1))
        return {np.dtype(self._ours.tensors[path].dtype) for path in paths if path in self._ours.tensors}

    def _extra_rows(self) -> int:
        """Number of dropped rows of the vocabulary. Raises MossError if their shapes do not fit the model."""
        if self._dropped_rows is None:
            return 0
        shapes = {name: tuple(tensor.shape) for name, tensor in self._dropped_rows.tensors.items()}
        embed_shape = shapes.get(VOCAB_TENSORS[TEXT_EMBED], ())
        width = self._config.hidden_size
        if len(embed_shape) != 2 or any(shape != (embed_shape[0], width) for shape in shapes.values()):
            raise MossError(
                f"{self._dropped_rows.path}: padding rows of shapes {shapes}, expected {width} columns each"
            )
        return embed_shape[0]


def split_config(
    folder: Path, special: Mapping[str, int], modality_layers: int | None, codes: int
) -> tuple[SpeechLMConfig, int]:
    """The config of the layer-split model, and the vocabulary size of the Qwen3 it is made from.

    Args:
        folder: of the Qwen3.
        special: {config field: id} of its text tokenizer.
        modality_layers, codes: see `import_qwen3`.
    """
    where = folder / "config.json"
    released = qwen3_keys(where)
    depth = released["num_hidden_layers"]
    vocab = released["vocab_size"]
    branch = default_modality_layers(depth) if modality_layers is None else modality_layers
    if not 0 <= branch < depth:
        raise MossError(f"{where}: {branch} layers for each branch, expected 0 to {depth - 1} of its {depth}")
    sizes = {key: released[key] for key in SAME_KEYS}
    ids: dict[str, Any] = dict(special)
    config = SpeechLMConfig(
        **sizes,
        **ids,
        head_dim=released.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"],
        num_shared_layers=depth - branch,
        num_modality_layers=branch,
        text_vocab_size=min(vocab, _padded(tokenizer_size(folder / "tokenizer.json"))),
        audio_vocab_size=_padded(codes + 1),
        eosp_id=codes,
        # Code 512 fills the audio channel of text rows in the released model.
        audio_pad_id=min(512, codes - 1),
    )
    check_special_ids(config, special, folder)
    return config, vocab


def _padded(size: int) -> int:
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _random_like(part: np.ndarray, seed: str) -> np.ndarray:
    """A random start of stacked layers: normal(0, 0.02), as Qwen3 is initialized, and scales of 1."""
    if part.ndim == 2:  # [L, D]: the scale of a norm
        return np.ones_like(part)
    rng = np.random.default_rng(list(seed.encode()))
    return np.stack([0.02 * rng.standard_normal(part.shape[1:], np.float32) for _ in part]).astype(part.dtype)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)

"""Import and export of the released language model `fnlp/MOSS-Speech`.

Sources: the released checkpoint's documented layout (446 tensors, bf16, in shards) and config keys.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from moss_jax.checkpoint import open_tensors
from moss_jax.checkpoint.config_io import read_config, write_config
from moss_jax.convert.files import (
    carry_files,
    copy_file,
    files_to_carry,
    report_unknown_keys,
    require_folder,
    update_json,
    write_json,
)
from moss_jax.convert.stream import TensorSource, exported_tensors, import_tensors, write_source
from moss_jax.convert.tables.speech_lm import CONFIG_KEYS, ID_KEYS, config_from_released, table
from moss_jax.documents import located, parse_object, read_json, read_text
from moss_jax.errors import MossError
from moss_jax.files import is_file
from moss_jax.progress import Say
from moss_jax.speech_lm.config import DTYPES, SpeechLMConfig
from moss_jax.speech_lm.model import model_shapes
from moss_jax.text.tokenizer import SPECIAL_STRINGS, token_ids

KEYS = CONFIG_KEYS | ID_KEYS  # our field -> key of the released config.json
KNOWN_KEYS = {
    *KEYS.values(),
    "architectures",
    "model_type",
    "auto_map",
    "num_hidden_layers",
    "hidden_act",
    "initializer_range",
    "rope_scaling",
    "attention_bias",
    "attention_dropout",
    "use_cache",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "tie_word_embeddings",
    "channels",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}


def import_language_model(folder: str | Path, system: Path, say: Say) -> SpeechLMConfig:
    """Writes `transformer/`, `text_tokenizer/` and `carried/model/` of a system from a released folder.

    Raises:
        MossError: a file or shard is missing or damaged, the config lacks keys or contradicts itself or the tensors, or
            tensors are unmapped, missing or misshapen.
    """
    folder = require_folder(folder, "a released language model (config.json, *.safetensors, tokenizer.json)")
    config = language_config(folder)
    reader = open_tensors(folder)
    files_to_carry(folder, reader.files())  # raises for bad links before the long work
    config = replace(config, **compute_dtypes(reader))
    target = system / "transformer"
    target.mkdir(parents=True)
    import_tensors(reader, table(config), model_shapes(config), target, say=say)
    write_json(target / "config.json", write_config(config))
    copy_text_tokenizer(folder, system)
    carry_files(folder, system / "carried" / "model", reader.files())
    report_unknown_keys(folder / "config.json", KNOWN_KEYS, say)  # last, so that an error is not preceded by a note
    return config


def export_language_model(system: str | Path, folder: Path, say: Say) -> None:
    """Writes the language model of a system in the released layout into an existing folder."""
    system = Path(system)
    config = read_speech_lm_config(system)
    carried = system / "carried" / "model"
    source = exported_tensors(open_tensors(system / "transformer"), table(config), model_shapes(config))
    if carried.is_dir():
        carry_files(carried, folder, within=system)
        original = language_config(folder)
        changed = {
            key: getattr(config, ours) for ours, key in KEYS.items() if getattr(config, ours) != getattr(original, ours)
        }
        if {"num_shared_layers", "num_modality_layers"} & set(changed):
            changed["num_hidden_layers"] = config.num_shared_layers + config.num_modality_layers
        if changed:
            update_json(folder / "config.json", changed)
    else:
        copy_file(system / "text_tokenizer" / "tokenizer.json", folder / "tokenizer.json", within=system)
        write_json(folder / "config.json", released_config(config))
    write_source(source, folder, metadata={"format": "pt"}, say=say)


def language_config(folder: Path) -> SpeechLMConfig:
    """Our config for a released folder. Special ids that its config.json lacks are taken from its text tokenizer."""
    special = special_ids(folder / "tokenizer.json")
    released = {ID_KEYS[field]: i for field, i in special.items()} | read_json(folder / "config.json")
    config = config_from_released(released, str(folder / "config.json"))
    check_special_ids(config, special, folder)
    return config


def released_config(config: SpeechLMConfig) -> dict[str, Any]:
    """A released config.json for our config, including the constant keys that its readers expect."""
    values = {key: getattr(config, ours) for ours, key in KEYS.items()}
    return {
        "architectures": ["MossSpeechForCausalLM"],
        "model_type": "moss_speech",
        **values,
        "num_hidden_layers": config.num_shared_layers + config.num_modality_layers,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "channels": 2,
        "torch_dtype": config.param_dtype,
    }


def read_speech_lm_config(system: Path) -> SpeechLMConfig:
    """The config of the language model in a system folder."""
    path = require_folder(system, "a system folder") / "transformer" / "config.json"
    return read_config(SpeechLMConfig, read_json(path), str(path))


class ComputeDtypes(TypedDict):
    """The two dtype fields of a config."""

    dtype: str
    param_dtype: str


def compute_dtypes(reader: TensorSource) -> ComputeDtypes:
    """The dtype of most bytes of a checkpoint, for activations and parameters; float32 if it is none of DTYPES."""
    sizes: dict[str, int] = {}
    for tensor in reader.tensors.values():
        name = str(np.dtype(tensor.dtype))
        sizes[name] = sizes.get(name, 0) + int(np.prod(tensor.shape))
    largest = max(sizes, key=lambda name: sizes[name], default="float32")
    dtype = largest if largest in DTYPES else "float32"
    return {"dtype": dtype, "param_dtype": dtype}


def special_ids(path: Path) -> dict[str, int]:
    """{config field: id} of the special strings that a tokenizer.json has.

    Raises:
        MossError: the file does not exist or is not a tokenizer.json.
    """
    if not is_file(path):
        raise MossError(f"{path}: no such file; AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes it")
    ids = _token_ids(path)
    return {field: ids[string] for field, string in SPECIAL_STRINGS.items() if string in ids}


def check_special_ids(config: SpeechLMConfig, special: Mapping[str, int], folder: Path) -> None:
    """Raises MossError if the special ids of the text tokenizer differ from those of the config."""
    wrong = [
        f"{SPECIAL_STRINGS[field]} is {i} in tokenizer.json, {field} is {getattr(config, field)} in config.json"
        for field, i in special.items()
        if getattr(config, field) != i
    ]
    if wrong:
        raise MossError("\n  ".join([f"{folder}: text tokenizer and config contradict each other", *wrong]))


def copy_text_tokenizer(folder: Path, system: Path) -> None:
    """Copies tokenizer.json of a release into a system."""
    copy_file(folder / "tokenizer.json", system / "text_tokenizer" / "tokenizer.json", within=folder)


def tokenizer_size(path: Path) -> int:
    """The largest id of a tokenizer.json plus one."""
    return 1 + max(_token_ids(path).values())


def _token_ids(path: Path) -> dict[str, int]:
    with located(path):
        vocabulary, added = token_ids(parse_object(read_text(path)))
    return vocabulary | added

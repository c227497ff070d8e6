"""Parameters to start from: a Qwen3, a released MOSS-Speech, a system of ours, what a stage exported, or random ones.

A parameter is read, put together and placed before the next one is looked at; on a mesh each device receives its part
of it only. The host never holds more than one stacked parameter.
"""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from moss_jax.checkpoint import check_shapes, open_tensors
from moss_jax.checkpoint.config_io import read_config
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SystemFolder
from moss_jax.components import check_codes
from moss_jax.convert.language_model import compute_dtypes, language_config, special_ids
from moss_jax.convert.layer_split import new_audio_tables, qwen3_config, split_parameter
from moss_jax.convert.qwen3 import RELEASED_CODES, split_config
from moss_jax.convert.resolve import find_folder
from moss_jax.convert.stream import Say, tensor_shapes
from moss_jax.convert.tables import qwen3 as qwen3_table
from moss_jax.convert.tables import speech_lm as released_table
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.sharding import shardings_for
from moss_jax.speech_lm import SpeechLMConfig, model_axes, model_shapes
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER
from moss_jax.train.run import Run
from moss_jax.train.run_folder import resolve_init
from moss_jax.train.speech_lm.stages import Stage, split_params
from moss_jax.train.speech_lm.step import frozen_shardings, trainable_shardings

RANDOM = "random"
Parameters = Iterator[tuple[str, np.ndarray]]
Flat = dict[str, jax.Array]


def initial_params(
    source: str | Path,
    config: SpeechLMConfig | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    modality_layers: int | None = None,
    codes: int = RELEASED_CODES,
    seed: int = 0,
    say: Say = lambda line: None,
) -> tuple[SpeechLMConfig, dict[str, jax.Array]]:
    """The config and the flat parameters {path: array} of a model to train.

    Args:
        source: "random" (then `config` is needed); a Qwen3 folder, whose upper layers become both branches; a released
            MOSS-Speech folder; a system folder; the `transformer/` folder of one, such as a stage exports. A name on
            the Hugging Face hub will do for a released folder or a Qwen3.
        config: what the source must turn out to be, in sizes and ids; None: as the source says.
        mesh: where the parameters go; None: the default device.
        dtype: of the parameters; None: as in the files, float32 for random ones.
        modality_layers, codes: of a Qwen3: layers of each branch (None: a ninth) and codes of the speech tokenizer.
        seed: of what is new: the audio table and head beside a Qwen3, or everything.

    Raises:
        MossError: nothing there, none of the known kinds, damaged, or not what `config` says.
    """
    if str(source) == RANDOM:
        if config is None:
            raise MossError("random parameters need a config, expected a preset or the sizes of a model")
        found = config
        parameters = _random(config, np.dtype(dtype or "float32"), seed)
    else:
        found, parameters = _open(find_folder(source), modality_layers, codes, seed)
        if config is not None:
            _check_same(config, found, source)
            found = config
    shapes = model_shapes(found)
    shardings = _shardings(found, mesh)
    flat = {}
    stored = None
    for path, value in parameters:
        stored = stored or value.dtype  # of the first, for what is new
        flat[path] = _place(value, shardings.get(path), np.dtype(dtype or (stored if path in _NEW else value.dtype)))
    check_shapes({path: tuple(x.shape) for path, x in flat.items()}, {p: s.shape for p, s in shapes.items()}, source)
    return found, flat


def initial_split(
    source: str | Path,
    stage: Stage,
    config: SpeechLMConfig | None = None,
    *,
    mesh: Mesh | None = None,
    frozen_dtype: Any = None,
    seed: int = 0,
    **options: Any,
) -> tuple[SpeechLMConfig, dict[str, jax.Array], dict[str, jax.Array]]:
    """(config, trainable float32, frozen): `initial_params` with the same options, then `split_params`, on the mesh."""
    config, flat = initial_params(source, config, mesh=mesh, seed=seed, **options)
    trainable, frozen = split_params(flat, stage, frozen_dtype=frozen_dtype, seed=seed)
    if mesh is not None:
        trainable = jax.device_put(trainable, trainable_shardings(config, stage, mesh))
        frozen = jax.device_put(frozen, frozen_shardings(config, stage, mesh))
    return config, trainable, frozen


def starting_parameters(run: Run, mesh: Mesh, say: Say) -> tuple[SpeechLMConfig, Flat, Flat]:
    """(config, trainable, frozen) before the first step; the config computes as the run says.

    Raises:
        MossError: `init` is none of the known things, damaged, or not of the sizes that the run names.
    """
    codes = {}
    if run.system and (Path(run.system) / "speech_tokenizer").is_dir():
        # A Qwen3 gets an audio table for the codes of this speech tokenizer.
        speech_tokenizer = SystemFolder(run.system).config(SPEECH_TOKENIZER)
        codes = {"codes": speech_tokenizer.quantize_vocab_size}
    config, trainable, frozen = initial_split(
        resolve_init(run.init),
        run.stage,
        run.model,
        mesh=mesh,
        frozen_dtype=run.frozen_dtype,
        seed=run.seed,
        modality_layers=run.split,
        say=say,
        **codes,
    )
    system = Path(run.system or resolve_init(run.init))
    if (system / SYSTEM_FILE).is_file():
        check_codes(SystemFolder(system), config, f"{run.init} and {system}" if run.system else None)
    dtypes = {"dtype": run.dtype, "param_dtype": run.frozen_dtype or config.param_dtype}
    return replace(config, remat=run.remat, attention=run.attention, **dtypes), trainable, frozen


_NEW = {"audio/embed/embedding", "audio/head/kernel"}  # float32 beside a Qwen3, whatever its own dtype


def _open(folder: Path, modality_layers: int | None, codes: int, seed: int) -> tuple[SpeechLMConfig, Parameters]:
    """Config and parameters, in our layout, of whatever kind of folder this is."""
    if (folder / SYSTEM_FILE).is_file():
        folder = SystemFolder(folder).component_folder("transformer")
    path = folder / "config.json"
    if not path.is_file():
        raise MossError(f"{folder}: no config.json, expected a system, a Qwen3 or a released MOSS-Speech")
    data = read_json(path)
    if "text_vocab_size" in data:  # our own field
        return read_config(SpeechLMConfig, data, str(path)), _ours(folder)
    if data.get("model_type") == "qwen3":
        return _qwen3(folder, modality_layers, codes, seed)
    if "num_shared_layers" in data:
        config = language_config(folder)
        reader = open_tensors(folder)
        config = replace(config, **compute_dtypes(reader))
        rows = released_table.table(config)
        shapes = model_shapes(config)
        rows.check(tensor_shapes(reader), shapes, str(reader.path))
        return config, ((entry.path, entry.to_ours(reader.read)) for entry in rows.entries(shapes))
    found = data.get("model_type")
    raise MossError(f"{path}: model_type is {found!r}, expected a system, a Qwen3 or a released MOSS-Speech")


def _ours(folder: Path) -> Parameters:
    reader = open_tensors(folder)
    return ((path, reader.read(path)) for path in reader.tensors)


def _qwen3(folder: Path, modality_layers: int | None, codes: int, seed: int) -> tuple[SpeechLMConfig, Parameters]:
    reader = open_tensors(folder)
    special = special_ids(folder / "tokenizer.json")
    config, vocab = split_config(folder, special, modality_layers, codes)
    config = replace(config, **compute_dtypes(reader))
    source = qwen3_config(config, vocab)
    shapes = dict(model_shapes(source))
    tied = "lm_head.weight" not in reader.tensors and bool(read_json(folder / "config.json").get("tie_word_embeddings"))
    if tied:
        del shapes["text/head/kernel"]
    rows = qwen3_table.table(source)
    rows.check(tensor_shapes(reader), shapes, str(reader.path))

    def parameters() -> Parameters:
        for entry in rows.entries(shapes):
            yield from split_parameter(entry.path, entry.to_ours(reader.read), config, tied)
        yield from new_audio_tables(config, seed)

    return config, parameters()


def _check_same(wanted: SpeechLMConfig, found: SpeechLMConfig, where: str | Path) -> None:
    """Sizes and ids must agree; how to compute is the caller's."""
    free = dict.fromkeys(("attention", "remat", "dtype", "param_dtype", "max_position_embeddings"))
    wanted = vars(wanted) | free
    found = vars(found) | free
    if wrong := [f"{key} is {found[key]}, expected {wanted[key]}" for key in wanted if wanted[key] != found[key]]:
        raise MossError("\n  ".join([f"{where}: not the model of the config", *wrong]))


def _shardings(config: SpeechLMConfig, mesh: Mesh | None) -> dict[str, Sharding]:
    return {} if mesh is None else shardings_for(model_axes(config), model_shapes(config), mesh)


def _place(value: np.ndarray, sharding: Sharding | None, dtype: Any) -> jax.Array:
    # A copy: a jax array must not rest on a mapped file, which may change.
    if sharding is None:
        return jax.device_put(np.array(value, dtype, order="C"))
    return jax.make_array_from_callback(value.shape, sharding, lambda at: np.array(value[at], dtype, order="C"))


def _random(config: SpeechLMConfig, dtype: Any, seed: int) -> Parameters:
    """Unit scales, and everything else normal(0, 0.02), Qwen3's `initializer_range`."""
    for path, leaf in model_shapes(config).items():
        if path.endswith("scale"):
            yield path, np.ones(leaf.shape, dtype)
        else:
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            yield path, (np.float32(0.02) * rng.standard_normal(leaf.shape, np.float32)).astype(dtype)

"""What a run starts from: a Qwen3, a released MOSS-Speech, a system folder, an export of a stage, or random parameters.

Parameters are read, stacked and placed one at a time; on a mesh each device receives its part only. The host never
holds more than one stacked parameter.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from moss_jax.checkpoint import TensorReader, check_shapes, open_tensors
from moss_jax.checkpoint.config_io import read_config
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SystemFolder
from moss_jax.components import check_codes
from moss_jax.convert.language_model import compute_dtypes, language_config, special_ids
from moss_jax.convert.layer_split import new_audio_tables, qwen3_config, split_parameter
from moss_jax.convert.qwen3 import RELEASED_CODES, split_config
from moss_jax.convert.resolve import find_folder
from moss_jax.convert.stream import tensor_shapes
from moss_jax.convert.tables import qwen3 as qwen3_table
from moss_jax.convert.tables import speech_lm as released_table
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.nn.qwen3 import INITIALIZER_RANGE
from moss_jax.sharding import shardings_for
from moss_jax.speech_lm import SpeechLMConfig, model_axes, model_shapes
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER
from moss_jax.train.run import RANDOM
from moss_jax.train.run_folder import resolve_init
from moss_jax.train.speech_lm.run import Run
from moss_jax.train.speech_lm.stages import Stage, split_params
from moss_jax.train.speech_lm.step import frozen_shardings, trainable_shardings

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
) -> tuple[SpeechLMConfig, dict[str, jax.Array]]:
    """The config and the flat parameters {path: array} of a model to train.

    Args:
        source: "random" (then `config` is needed); a Qwen3 folder, whose upper layers become both branches; a released
            MOSS-Speech folder; a system folder, such as a stage exports; the `transformer/` folder of one. A Qwen3 or a
            released model may also be the name of a repository on the Hugging Face Hub.
        config: sizes and ids that the source must have; None: those of the source.
        mesh: of the parameters; None: the default device.
        dtype: of the parameters; None: as in the files, float32 for random ones.
        modality_layers, codes: for a Qwen3: layers of each branch (None: a ninth of all) and codes of the speech
            tokenizer.
        seed: of new parameters: the audio table and head for a Qwen3, or all of them.

    Raises:
        MossError: `source` is missing, of an unknown kind, or damaged, or differs from `config`.
    """
    if str(source) == RANDOM:
        if config is None:
            raise MossError("random parameters need a config, expected a preset or the sizes of a model")
        parameters = _random(config, np.dtype(dtype or "float32"), seed)
    else:
        source_config, parameters = _open(find_folder(source), modality_layers, codes, seed)
        if config is None:
            config = source_config
        else:
            _check_same(config, source_config, source)
    shardings = _shardings(config, mesh)
    flat: Flat = {}
    stored_dtype = None
    for path, value in parameters:
        stored_dtype = stored_dtype or value.dtype  # of the first parameter, used for new ones
        own_dtype = stored_dtype if path in _NEW else value.dtype
        flat[path] = _place(value, shardings.get(path), np.dtype(dtype or own_dtype))
    expected = {path: leaf.shape for path, leaf in model_shapes(config).items()}
    check_shapes({path: tuple(x.shape) for path, x in flat.items()}, expected, source)
    return config, flat


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
    """(config, trainable float32, frozen) on the mesh: `initial_params` with the same options, then `split_params`."""
    config, flat = initial_params(source, config, mesh=mesh, seed=seed, **options)
    trainable, frozen = split_params(flat, stage, frozen_dtype=frozen_dtype, seed=seed)
    if mesh is not None:
        trainable = jax.device_put(trainable, trainable_shardings(config, stage, mesh))
        frozen = jax.device_put(frozen, frozen_shardings(config, stage, mesh))
    return config, trainable, frozen


def starting_parameters(run: Run, mesh: Mesh) -> tuple[SpeechLMConfig, Flat, Flat]:
    """(config, trainable, frozen) before the first step; dtypes, remat and attention of the config are the run's.

    Raises:
        MossError: the run's `init` is of an unknown kind, damaged, or differs from the sizes in the run.
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
        **codes,
    )
    system = Path(run.system or resolve_init(run.init))
    if (system / SYSTEM_FILE).is_file():
        check_codes(SystemFolder(system), config, f"{run.init} and {system}" if run.system else None)
    param_dtype = run.frozen_dtype or config.param_dtype
    config = replace(config, remat=run.remat, attention=run.attention, dtype=run.dtype, param_dtype=param_dtype)
    return config, trainable, frozen


_NEW = {"audio/embed/embedding", "audio/head/kernel"}  # made in float32 for a Qwen3, whatever the dtype of its file


def _open(folder: Path, modality_layers: int | None, codes: int, seed: int) -> tuple[SpeechLMConfig, Parameters]:
    """Config and parameters, in our layout, of a folder of any known kind."""
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
        config = _with_stored_dtypes(config, reader)
        rows = released_table.table(config)
        shapes = model_shapes(config)
        rows.check(tensor_shapes(reader), shapes, str(reader.path))
        return config, ((entry.path, entry.to_ours(reader.read)) for entry in rows.entries(shapes))
    model_type = data.get("model_type")
    raise MossError(f"{path}: model_type is {model_type!r}, expected a system, a Qwen3 or a released MOSS-Speech")


def _with_stored_dtypes(config: SpeechLMConfig, reader: TensorReader) -> SpeechLMConfig:
    dtypes = compute_dtypes(reader)
    return replace(config, dtype=dtypes["dtype"], param_dtype=dtypes["param_dtype"])


def _ours(folder: Path) -> Parameters:
    reader = open_tensors(folder)
    return ((path, reader.read(path)) for path in reader.tensors)


def _qwen3(folder: Path, modality_layers: int | None, codes: int, seed: int) -> tuple[SpeechLMConfig, Parameters]:
    reader = open_tensors(folder)
    special = special_ids(folder / "tokenizer.json")
    config, vocab = split_config(folder, special, modality_layers, codes)
    config = _with_stored_dtypes(config, reader)
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


def _check_same(expected: SpeechLMConfig, actual: SpeechLMConfig, where: str | Path) -> None:
    """Sizes and ids must agree; how to compute is the caller's choice."""
    ignored = {"attention", "remat", "dtype", "param_dtype", "max_position_embeddings"}
    problems = []
    for name, value in vars(expected).items():
        actual_value = getattr(actual, name)
        if name not in ignored and value != actual_value:
            problems.append(f"{name} is {actual_value}, expected {value}")
    if problems:
        raise MossError("\n  ".join([f"{where}: not the model of the config", *problems]))


def _shardings(config: SpeechLMConfig, mesh: Mesh | None) -> Mapping[str, Sharding]:
    return {} if mesh is None else shardings_for(model_axes(config), model_shapes(config), mesh)


def _place(value: np.ndarray, sharding: Sharding | None, dtype: Any) -> jax.Array:
    # A copy: a jax array must not refer to a memory-mapped file, which may change.
    if sharding is None:
        return jax.device_put(np.array(value, dtype, order="C"))
    return jax.make_array_from_callback(value.shape, sharding, lambda at: np.array(value[at], dtype, order="C"))


def _random(config: SpeechLMConfig, dtype: Any, seed: int) -> Parameters:
    """Norm scales of one, all other parameters normal with Qwen3's standard deviation."""
    for path, leaf in model_shapes(config).items():
        if path.endswith("scale"):
            yield path, np.ones(leaf.shape, dtype)
        else:
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            yield path, (np.float32(INITIALIZER_RANGE) * rng.standard_normal(leaf.shape, np.float32)).astype(dtype)

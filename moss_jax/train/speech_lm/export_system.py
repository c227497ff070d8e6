"""Exports language models as system folders, for `moss-jax chat --model` and `moss-jax convert --export`.

Frozen parameters are written unchanged, bit for bit; adapters are merged into their kernels.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_jax.checkpoint import TensorWriter
from moss_jax.checkpoint.config_io import write_config
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SYSTEM_FORMAT
from moss_jax.convert.files import copy_file, write_json
from moss_jax.files import link_or_copy, replace_folder
from moss_jax.nn.tree import flatten
from moss_jax.progress import Say
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.train.gather import gather_to_host
from moss_jax.train.run_folder import resolve_init
from moss_jax.train.speech_lm.lora import PREFIX, is_adapter
from moss_jax.train.speech_lm.run import Run
from moss_jax.train.speech_lm.stages import Stage, join_params

Flat = dict[str, jax.Array]


def export_system(
    run: Run, config: SpeechLMConfig, trainable: Flat, frozen: Flat, folder: Path, say: Say, dtype: str | None = None
) -> None:
    """Writes the model as a system folder, atomically, replacing an existing one. Every process must call it.

    Args:
        config: of the model.
        trainable, frozen: the flat parameters of the stage.
        folder: of the system.
        dtype: of the trained parameters; None: the run's `export_dtype`, else that of the frozen parameters.
    """
    dtype = dtype or run.export_dtype or run.frozen_dtype or config.param_dtype
    shapes = jax.eval_shape(lambda t, f: flatten(join_params(t, f, run.stage, dtype)), trainable, frozen)
    values = parameters(run.stage, trainable, frozen, dtype)
    if jax.process_index():
        for _ in values:  # every process takes part in gathering them, only the first one writes
            pass
        return
    with replace_folder(folder) as part:
        transformer = part / "transformer"
        transformer.mkdir()
        with TensorWriter(transformer, shapes) as writer:
            for path, value in values:
                writer.write(path, value)
        exported_config = dataclasses.replace(config, remat="none", param_dtype=dtype)
        write_json(transformer / "config.json", write_config(exported_config))
        _add_rest(run, part, say)
    say(f"exported: {folder}")


def parameters(stage: Stage, trainable: Flat, frozen: Flat, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(path, value) of the whole model's parameters, one in host memory at a time."""
    adapters: dict[str, Flat] = {}
    for path, value in trainable.items():
        if is_adapter(path):
            adapters.setdefault(path.removeprefix(PREFIX).rpartition("/")[0] + "/kernel", {})[path] = value
    for path in sorted({*frozen} | {path for path in trainable if not is_adapter(path)}):
        trained = adapters.get(path, {})
        if path in trainable:
            trained[path] = trainable[path]
        fixed = {path: frozen[path]} if path in frozen else {}
        # What did not train is not even copied, so that it keeps its dtype.
        value = flatten(join_params(trained, fixed, stage, dtype))[path] if trained else fixed[path]
        yield path, gather_to_host(value)


def _add_rest(run: Run, folder: Path, say: Say) -> None:
    """Adds all components of a system but the language model, from the run's `system` or its `init`."""
    source = Path(run.system or resolve_init(run.init))
    if (source / SYSTEM_FILE).is_file():
        for path in sorted(source.iterdir()):
            if path.name == "transformer" or path.name.startswith("."):
                continue
            if path.is_dir():
                shutil.copytree(path, folder / path.name, copy_function=link_or_copy)
            else:
                copy_file(path, folder / path.name)
        return
    write_json(folder / SYSTEM_FILE, {"format": SYSTEM_FORMAT, "default_voice": None})
    (folder / "voices").mkdir()
    if (source / "tokenizer.json").is_file():
        copy_file(source / "tokenizer.json", folder / "text_tokenizer" / "tokenizer.json")
    else:
        say(f"note: {source} has no text tokenizer for the export; take one from a system with --set system=SYSTEM")

"""Checkpoints as system folders: `moss-jax chat --model` and `moss-jax convert --export` take them.

The frozen parameters are written as they are held, bit for bit; adapters are merged into their kernels.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moss_jax.checkpoint import TensorWriter, atomic_folder
from moss_jax.convert.files import copy_file, write_json
from moss_jax.dialogue.folder import FORMAT, SYSTEM
from moss_jax.errors import MossError
from moss_jax.nn.config import write_config
from moss_jax.nn.tree import flatten
from moss_jax.sharding import make_mesh
from moss_jax.train.checkpoints import CHECKPOINTS, Checkpoints, verify
from moss_jax.train.lora import PREFIX, is_adapter
from moss_jax.train.record import check_record, describe, fingerprint
from moss_jax.train.run import Run, read_run
from moss_jax.train.stages import Stage, join_params
from moss_jax.train.start import init_folder, starting_parameters
from moss_jax.transformer import TransformerConfig
from moss_jax.transformer.config import DTYPES

Say = Callable[[str], None]
Flat = dict[str, jax.Array]


def export_system(
    run: Run, config: TransformerConfig, trainable: Flat, frozen: Flat, folder: Path, say: Say, dtype: str | None = None
) -> None:
    """Writes the model as a system, whole or not at all, in place of one that is there. Every process calls it.

    Args:
        config: of the model.
        trainable, frozen: the flat parameters of the stage.
        folder: of the system.
        dtype: of the parameters that trained; None: the run's `export_dtype`, else as the frozen ones are held.
    """
    dtype = dtype or run.export_dtype or run.frozen_dtype or config.param_dtype
    shapes = jax.eval_shape(lambda t, f: flatten(join_params(t, f, run.stage, dtype)), trainable, frozen)
    values = parameters(run.stage, trainable, frozen, dtype)
    if jax.process_index():
        for _ in values:  # takes part in collecting them
            pass
        return
    with _replaced(folder) as part:
        room = part / "transformer"
        room.mkdir()
        with TensorWriter(room, shapes) as writer:
            for path, value in values:
                writer.write(path, value)
        write_json(room / "config.json", write_config(dataclasses.replace(config, remat="none", param_dtype=dtype)))
        _add_rest(run, part, say)
    say(f"exported: {folder}")


def parameters(stage: Stage, trainable: Flat, frozen: Flat, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(path, value) of the whole model's parameters, one in host memory at a time."""
    adapters: dict[str, Flat] = {}
    for path, value in trainable.items():
        if is_adapter(path):
            adapters.setdefault(path.removeprefix(PREFIX).rpartition("/")[0] + "/kernel", {})[path] = value
    for path in sorted({*frozen} | {path for path in trainable if not is_adapter(path)}):
        mine = {path: trainable[path]} if path in trainable else {}
        rest = {path: frozen[path]} if path in frozen else {}
        if mine or path in adapters:
            value = flatten(join_params(mine | adapters.get(path, {}), rest, stage, dtype))[path]
        else:
            value = rest[path]
        yield path, _collected(value)


def export_checkpoint(
    folder: str | Path, output: str | Path, step: int | None = None, dtype: str | None = None, say: Say = print
) -> None:
    """Writes a checkpoint of a run as a system.

    Args:
        folder: of the run.
        output: a folder that is not there yet, or is empty.
        step: of the checkpoint; None: the newest whole one.
        dtype: of the parameters that trained; None: as the run says.

    Raises:
        MossError: no such run, checkpoint or dtype, a damaged checkpoint, or `output` is there or cannot be written.
    """
    folder, output, run = Path(folder), Path(output), read_run(folder)
    if dtype is not None and dtype not in DTYPES:
        raise MossError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MossError(f"{output}: already there; remove it or choose another folder")
    checkpoints = Checkpoints(folder / CHECKPOINTS, run.keep, say)
    try:
        if step is None and (step := checkpoints.newest_whole()) is None:
            raise MossError(f"{folder}: this run has no whole checkpoint yet")
        if step not in checkpoints.steps():
            told = ", ".join(map(str, checkpoints.steps())) or "none"
            raise MossError(f"{folder}: no checkpoint of step {step}, there are: {told}")
        if problem := verify(checkpoints.folder / str(step)):
            raise MossError(f"{checkpoints.folder / str(step)}: damaged, {problem}")
        mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
        config, trainable, frozen = starting_parameters(run, mesh, say)
        like = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in trainable.items()}
        del trainable
        expected = describe(config, run, fingerprint(frozen))
        check_record(checkpoints.record(step), expected, checkpoints.folder / str(step), say)
        params = checkpoints.restore(step, params=like)["params"]
    finally:
        checkpoints.close()
    export_system(run, config, params, frozen, output, say, dtype)


def _collected(value: jax.Array) -> np.ndarray:
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def _add_rest(run: Run, folder: Path, say: Say) -> None:
    """Everything of a system but the language model, from the run's `system` or from what it started with."""
    source = Path(run.system or init_folder(run.init))
    if (source / SYSTEM).is_file():
        for path in sorted(source.iterdir()):
            if path.name == "transformer" or path.name.startswith("."):
                continue
            if path.is_dir():
                shutil.copytree(path, folder / path.name, copy_function=_link)
            else:
                copy_file(path, folder / path.name)
        return
    write_json(folder / SYSTEM, {"format": FORMAT, "default_voice": None})
    (folder / "voices").mkdir()
    if (source / "tokenizer.json").is_file():
        copy_file(source / "tokenizer.json", folder / "text_tokenizer" / "tokenizer.json")
    else:
        say(f"note: {source} has no text tokenizer for the export; --set system=SYSTEM names one that has")


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody writes into, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """`atomic_folder`, also where a folder of that name is there: that one goes when the new one is whole."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    with atomic_folder(new) as part:
        yield part
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)

"""What a run starts from: its model's config and parameters, split by its stage and laid out on the mesh."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SystemFolder
from moss_jax.components import check_codes
from moss_jax.errors import MossError
from moss_jax.speech_lm import TransformerConfig
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER
from moss_jax.train.run import EXPORTS, RUN_FILE, Run
from moss_jax.train.speech_lm.initial import initial_split

Say = Callable[[str], None]
Flat = dict[str, jax.Array]


def starting_parameters(run: Run, mesh: Mesh, say: Say) -> tuple[TransformerConfig, Flat, Flat]:
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
        init_folder(run.init),
        run.stage,
        run.model,
        mesh=mesh,
        frozen_dtype=run.frozen_dtype,
        seed=run.seed,
        modality_layers=run.split,
        say=say,
        **codes,
    )
    system = Path(run.system or init_folder(run.init))
    if (system / SYSTEM_FILE).is_file():
        check_codes(SystemFolder(system), config, f"{run.init} and {system}" if run.system else None)
    dtypes = {"dtype": run.dtype, "param_dtype": run.frozen_dtype or config.param_dtype}
    return dataclasses.replace(config, remat=run.remat, attention=run.attention, **dtypes), trainable, frozen


def init_folder(init: str) -> str:
    """Where a run starts from: of an earlier run its newest export, else what was given."""
    return str(newest_export(init)) if (Path(init) / RUN_FILE).is_file() else init


def newest_export(folder: str | Path) -> Path:
    """The export of the most steps of a run. Raises MossError when it has none."""
    exports = [path for path in (Path(folder) / EXPORTS).glob("*") if path.name.isdigit()]
    if not exports:
        raise MossError(f"{folder}: this run has no export yet; moss-jax export {folder} -o SYSTEM makes one")
    return max(exports, key=lambda path: int(path.name))

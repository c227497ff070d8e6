"""What a run starts from: its model's config and parameters, split by its stage and laid out on the mesh."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from moss_jax.checkpoint.system_folder import SYSTEM, SystemFolder
from moss_jax.progress import Say
from moss_jax.speech_lm import TransformerConfig
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.train.run import Run
from moss_jax.train.run_folder import resolve_init
from moss_jax.train.speech_lm.initial import initial_split

Flat = dict[str, jax.Array]


def starting_parameters(run: Run, mesh: Mesh, say: Say) -> tuple[TransformerConfig, Flat, Flat]:
    """(config, trainable, frozen) before the first step; the config computes as the run says.

    Raises:
        MossError: `init` is none of the known things, damaged, or not of the sizes that the run names.
    """
    codes = {}
    if run.system and (Path(run.system) / "speech_tokenizer").is_dir():
        # A Qwen3 gets an audio table for the codes of this speech tokenizer.
        speech_tokenizer = SystemFolder(run.system).config("speech_tokenizer", SpeechTokenizerConfig)
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
    if (system / SYSTEM).is_file():
        SystemFolder(system).check_codes(config, f"{run.init} and {system}" if run.system else None)
    dtypes = {"dtype": run.dtype, "param_dtype": run.frozen_dtype or config.param_dtype}
    return dataclasses.replace(config, remat=run.remat, attention=run.attention, **dtypes), trainable, frozen

"""Exports the trained part of a speech decoder as a system: everything else is taken from another system."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.checkpoint import save_tree
from moss_jax.checkpoint.config_io import write_config
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SYSTEM_FORMAT, SystemFolder
from moss_jax.convert.files import write_json
from moss_jax.files import link_or_copy, replace_folder
from moss_jax.progress import Say
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.train.gather import gather_to_host
from moss_jax.train.run import RANDOM
from moss_jax.train.run_folder import resolve_init
from moss_jax.train.speech_decoder.run import SpeechDecoderRun


def export_parts(
    run: SpeechDecoderRun,
    config: SpeechDecoderConfig,
    merge: Callable[[SpeechDecoderConfig], SpeechDecoderConfig],
    pattern: str,
    parts: Mapping[str, Mapping[str, jax.Array]],
    folder: Path,
    dtype: str | None,
    say: Say,
) -> None:
    """Writes a system with the trained part of its speech decoder, completely or not at all. Every process calls it.

    Args:
        config: of the run, for a system that has no speech decoder yet.
        merge: puts the trained part into the config of the system that everything else is taken from.
        pattern: of the file names that the parts replace.
        parts: flat parameters by the stem of their file; several stems may share the same parameters.
        dtype: of the weights; None: the run's `export_dtype`, else float32.
    """
    dtype = dtype or run.export_dtype or "float32"
    on_host: dict[int, dict[str, np.ndarray]] = {}
    for flat in parts.values():
        if id(flat) not in on_host:
            on_host[id(flat)] = {path: gather_to_host(leaf).astype(jnp.dtype(dtype)) for path, leaf in flat.items()}
    if jax.process_index():
        return
    system = run.system or (run.init if run.init != RANDOM else None)
    source = Path(resolve_init(system)) if system else None
    with replace_folder(folder) as part:
        if source is not None and (source / SYSTEM_FILE).is_file():
            shutil.copytree(source, part, copy_function=link_or_copy, dirs_exist_ok=True)
        else:
            write_json(part / SYSTEM_FILE, {"format": SYSTEM_FORMAT, "default_voice": None})
        decoder = part / "speech_decoder"
        if (decoder / "config.json").is_file():
            config = merge(SystemFolder(part).config(SPEECH_DECODER))
            # A link to the source's file: it must not be written into.
            (decoder / "config.json").unlink()
        decoder.mkdir(exist_ok=True)
        for old in decoder.glob(f"{pattern}.safetensors*"):
            old.unlink()
        written: dict[int, Path] = {}
        for stem, flat in parts.items():
            path = decoder / f"{stem}.safetensors"
            if id(flat) in written:
                link_or_copy(written[id(flat)], path)
            else:
                # One file, however large, so that it can be linked under other names.
                save_tree(decoder, on_host[id(flat)], stem, shard_bytes=2**62)
                written[id(flat)] = path
        write_json(decoder / "config.json", write_config(config))
    say(f"exported: {folder}")

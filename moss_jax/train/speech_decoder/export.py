"""What trained, as a part of a system: its weights and sizes under speech_decoder/, all else from another system."""

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
from moss_jax.train.run_folder import resolve_init
from moss_jax.train.speech_decoder.run import SpeechDecoderRun


def export_parts(
    run: SpeechDecoderRun,
    config: SpeechDecoderConfig,
    merged: Callable[[SpeechDecoderConfig], SpeechDecoderConfig],
    pattern: str,
    parts: Mapping[str, Mapping[str, jax.Array]],
    folder: Path,
    dtype: str | None,
    say: Say,
) -> None:
    """Writes a system, whole or not at all. Every process calls it.

    Args:
        config: of the run, for a system that has no speech decoder yet.
        merged: puts what trained into the config of the system that everything else is taken from.
        pattern: of the names of the files that the parts replace.
        parts: flat parameters by the name of their file; the same ones may stand under several.
        dtype: of the weights; None: the run's `export_dtype`, else float32.
    """
    dtype = dtype or run.export_dtype or "float32"
    known: dict[int, dict[str, np.ndarray]] = {}
    for flat in parts.values():
        if id(flat) not in known:
            known[id(flat)] = {path: gather_to_host(leaf).astype(jnp.dtype(dtype)) for path, leaf in flat.items()}
    if jax.process_index():
        return
    source = run.system or (run.init if run.init != "random" else None)
    source = source and Path(resolve_init(source))
    with replace_folder(folder) as part:
        if source and (source / SYSTEM_FILE).is_file():
            shutil.copytree(source, part, copy_function=link_or_copy, dirs_exist_ok=True)
        else:
            write_json(part / SYSTEM_FILE, {"format": SYSTEM_FORMAT, "default_voice": None})
        room = part / "speech_decoder"
        if (room / "config.json").is_file():
            config = merged(SystemFolder(part).config(SPEECH_DECODER))
            (room / "config.json").unlink()
        room.mkdir(exist_ok=True)
        for old in room.glob(f"{pattern}.safetensors*"):
            old.unlink()
        first: dict[int, Path] = {}
        for stem, flat in parts.items():
            if id(flat) in first:
                link_or_copy(first[id(flat)], room / f"{stem}.safetensors")
            else:
                save_tree(room, known[id(flat)], stem, shard_bytes=2**62)
                first[id(flat)] = room / f"{stem}.safetensors"
        write_json(room / "config.json", write_config(config))
    say(f"exported: {folder}")

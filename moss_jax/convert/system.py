"""Converts released checkpoints to system folders, and system folders back to the released layouts.

A system folder contains system.json, transformer/, speech_tokenizer/, speech_decoder/, text_tokenizer/, voices/ and
carried/ (what an export restores). All functions write the output completely or not at all.
"""

from pathlib import Path
from typing import Any

from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SYSTEM_FORMAT, SystemFolder
from moss_jax.components import check_codes
from moss_jax.convert.codec import NOTES_FILE, export_codec, import_codec
from moss_jax.convert.files import carry_files, copy_file, require_folder, write_json
from moss_jax.convert.language_model import export_language_model, import_language_model, language_config
from moss_jax.convert.qwen3 import RELEASED_CODES, export_qwen3, import_qwen3
from moss_jax.files import atomic_folder
from moss_jax.progress import Say
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER

# The folders of an export to the released layouts.
MODEL_FOLDER = "MOSS-Speech"
CODEC_FOLDER = "MOSS-Speech-Codec"
# The folders of a system that belong to its codec. Voices are prompts in its codes.
CODEC_PARTS = ("speech_tokenizer", "speech_decoder", "voices", "carried/codec", "carried/unused")


def convert_released(model: str | Path, codec: str | Path, out: str | Path, say: Say) -> None:
    """Writes a system from a released language model and a codec.

    Args:
        model: folder of the released language model.
        codec: folder of the released codec, or a system whose codec and voices are copied.
        out: folder of the new system, which must not exist or be empty.
        say: receives progress messages.

    Raises:
        MossError: a file is missing or damaged, or the two have different numbers of speech codes.
    """
    model = require_folder(model, "a released language model (config.json, *.safetensors, tokenizer.json)")
    config = language_config(model)
    with atomic_folder(out) as folder:
        _start_system(folder, codec, say)
        check_codes(SystemFolder(folder), config, f"{model} and {codec}")  # before the long work
        import_language_model(model, folder, say)


def convert_qwen3(
    qwen3: str | Path,
    out: str | Path,
    say: Say,
    modality_layers: int | None = None,
    codec: str | Path | None = None,
    audio_branch: str = "copy",
    seed: int = 0,
) -> None:
    """Writes a system whose language model is made from a Qwen3.

    Args:
        qwen3: folder of the Qwen3.
        out: folder of the new system, which must not exist or be empty.
        say: receives progress messages.
        modality_layers, audio_branch, seed: see `import_qwen3`.
        codec: folder of the released codec, or a system whose codec and voices are copied; it determines the number of
            speech codes. None: the number of the released codec, and the system has no speech tokenizer or decoder.
    """
    with atomic_folder(out) as folder:
        codes = _start_system(folder, codec, say)
        import_qwen3(qwen3, folder, modality_layers, codes, audio_branch, seed, say)


def export_released(system: str | Path, out: str | Path, say: Say) -> None:
    """Writes the released folders `MOSS-Speech` and `MOSS-Speech-Codec` below `out`, if the system has their parts."""
    system_folder = SystemFolder(system)
    check_codes(system_folder)
    system = system_folder.path
    with atomic_folder(out) as folder:
        if (system / "transformer").is_dir():
            (folder / MODEL_FOLDER).mkdir()
            export_language_model(system, folder / MODEL_FOLDER, say)
        if (system / "speech_decoder").is_dir():
            (folder / CODEC_FOLDER).mkdir()
            export_codec(system, folder / CODEC_FOLDER, say)


def export_text_path(system: str | Path, out: str | Path, say: Say) -> None:
    """Writes the text path of the language model as a plain Qwen3."""
    system = SystemFolder(system).path
    with atomic_folder(out) as folder:
        export_qwen3(system, folder, say)


def _start_system(folder: Path, codec: str | Path | None, say: Say) -> int:
    """Writes system.json, voices/ and the codec, if there is one; returns the number of speech codes."""
    settings: dict[str, Any] = {"format": SYSTEM_FORMAT, "default_voice": None}
    codes = RELEASED_CODES
    if codec is not None and (Path(codec) / SYSTEM_FILE).is_file():
        system = SystemFolder(codec)
        for component in ("speech_tokenizer", "speech_decoder"):
            system.component_folder(component)  # raises if it is missing
        for name in CODEC_PARTS:
            if (system.path / name).is_dir():
                carry_files(system.path / name, folder / name, within=system.path)
        if (system.path / NOTES_FILE).is_file():
            copy_file(system.path / NOTES_FILE, folder / NOTES_FILE, within=system.path)
        settings["default_voice"] = system.settings.get("default_voice")
        codes = system.config(SPEECH_TOKENIZER).quantize_vocab_size
    elif codec is not None:
        codes = import_codec(codec, folder, say).tokenizer.quantize_vocab_size
    (folder / "voices").mkdir(exist_ok=True)
    write_json(folder / SYSTEM_FILE, settings)
    check_codes(SystemFolder(folder), where=str(codec))
    return codes

"""The system under evaluation."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from moss_jax.audio.wave import load_audio
from moss_jax.checkpoint.old_names import old_path
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SYSTEM_FORMAT, SystemFolder
from moss_jax.convert.files import write_json
from moss_jax.convert.qwen3 import import_qwen3
from moss_jax.convert.resolve import conversion_path, convert_once
from moss_jax.dialogue.system import System
from moss_jax.errors import MossError
from moss_jax.evaluate.items import ContentPart
from moss_jax.evaluate.scoring import Scorer
from moss_jax.files import atomic_folder
from moss_jax.nn.fingerprint import fingerprint
from moss_jax.nn.tree import flatten
from moss_jax.progress import Say
from moss_jax.sharding import make_mesh
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.text.tokenizer import TextTokenizer

RECORDINGS_IN_MEMORY = 32


class EvaluatedModel:
    """A system on all devices of this host.

    Args:
        folder: system folder.
        fsdp, tensor: number of devices over which the parameters are divided (see `moss_jax.sharding`); the other
            devices have copies and divide the batch.
        batch_size: passages or questions at a time; rounded up to a multiple of the devices that divide the batch.

    Raises:
        MossError: fsdp * tensor does not divide the number of devices, or the folder is not a system.
    """

    def __init__(self, folder: str | Path, *, fsdp: int = 1, tensor: int = 1, batch_size: int = 8) -> None:
        devices = len(jax.devices())
        if fsdp < 1 or tensor < 1 or devices % (fsdp * tensor):
            raise MossError(f"fsdp {fsdp} x tensor {tensor}: expected numbers whose product divides {devices} devices")
        mesh = None if devices == 1 else make_mesh(data=devices // (fsdp * tensor), fsdp=fsdp, tensor=tensor)
        self.system = System(folder, mesh=mesh)
        shards = devices // tensor
        self.batch_size = -(-max(batch_size, 1) // shards) * shards

    @cached_property
    def code_count(self) -> int:
        """Number of speech codes. No weights are loaded for it."""
        return self.system.folder.config(SPEECH_LM).eosp_id

    @property
    def config(self) -> SpeechLMConfig:
        """The config of the language model."""
        return self.system.language_model.config

    @property
    def text_tokenizer(self) -> TextTokenizer:
        return self.system.language_model.text_tokenizer

    @cached_property
    def scorer(self) -> Scorer:
        language_model = self.system.language_model
        return Scorer(language_model.config, language_model.params, language_model.mesh, self.batch_size)

    def language_model_hash(self) -> str:
        """A hash of the language model's weights, for results that depend on them."""
        return self.system.language_model.fingerprint

    def codec_hash(self) -> str:
        """A hash of the weights of speech tokenizer and decoder, for results that depend on them."""
        _, parts = self.system.folder.load(SPEECH_DECODER)
        speech = {name: parts[name] for name in ("flow", "vocoder")}
        params = {"speech_tokenizer": self.system.speech_tokenizer.params, **speech}
        # Under the parameter names of version 0.1.0, so that results of that version can be continued.
        return f"{fingerprint({old_path(path): leaf for path, leaf in flatten(params).items()}):08x}"

    def codes(self, parts: Sequence[ContentPart], say: Say = lambda line: None) -> dict[ContentPart, np.ndarray]:
        """Speech codes, int32 [T], of the parts that are not text; each recording is read and encoded once.

        Raises:
            MossError: a recording cannot be read, or is too short for a code.
        """
        by_part = {part: np.array(part.codes, np.int32) for part in parts if part.codes is not None}
        recordings = {part: part.audio for part in parts if part.audio is not None}
        unique = list(recordings)
        for first in range(0, len(unique), RECORDINGS_IN_MEMORY):
            group = unique[first : first + RECORDINGS_IN_MEMORY]
            codes = self.system.encode([load_audio(recordings[part]) for part in group])
            by_part |= zip(group, codes, strict=True)
            say(f"encoded {first + len(group)} of {len(unique)} recordings")
        if empty := [part for part, codes in by_part.items() if not len(codes)]:
            raise MossError(f"{empty[0].audio}: too short, it gives no codes")
        return by_part


def control_folder(folder: str | Path, codes: int, cache: Path, say: Say) -> Path:
    """A system folder for a control model; a plain Qwen3 is converted once, with random embeddings for the codes.

    Args:
        folder: of a system or of a Qwen3.
        codes: number of speech codes.
        cache: folder in which a converted Qwen3 is kept.
        say: receives progress messages.
    """
    folder = Path(folder)
    if (folder / SYSTEM_FILE).is_file():
        return SystemFolder(folder).path
    if not (folder / "config.json").is_file():
        raise MossError(f"{folder}: neither a system folder ({SYSTEM_FILE}) nor a Qwen3 (config.json)")
    status = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    mark = hashlib.sha256(repr((str(folder.resolve()), codes, status)).encode()).hexdigest()[:12]
    target = conversion_path(cache, folder, mark)

    def convert() -> None:
        with atomic_folder(target) as part:
            import_qwen3(folder, part, codes=codes, say=say)
            write_json(part / SYSTEM_FILE, {"format": SYSTEM_FORMAT, "default_voice": None})

    return convert_once(target, convert, say)

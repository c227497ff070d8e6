"""A system folder: the components of a system with their configs and parameters, its text tokenizer and its voices.

FOLDER/system.json                {"format": "moss-jax-1", "default_voice": name or null, "sampling": {...}}
       transformer/               config.json, *.safetensors
       speech_tokenizer/          config.json, model.safetensors
       speech_decoder/            config.json, flow*.safetensors, vocoder.safetensors, speaker.safetensors
       text_tokenizer/            tokenizer.json
       voices/                    NAME.safetensors

`sampling` may be absent: keywords of `moss_jax.dialogue.system.generation_settings` that are this system's defaults.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from moss_jax.checkpoint.component import Component, ComponentParams
from moss_jax.checkpoint.config_io import read_config
from moss_jax.documents import MAX_NAME, read_json, shown
from moss_jax.errors import MossError
from moss_jax.files import is_file, is_folder, write_text

SYSTEM_FORMAT = "moss-jax-1"
SYSTEM_FILE = "system.json"
NANO_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "nano"  # the system that is part of the package
VOICE_NAME = re.compile(r"[\w][\w.-]*")

C = TypeVar("C")


@dataclass(frozen=True)
class _SystemFile:
    """The fields of system.json that are used, besides `format`; others are kept as they are."""

    default_voice: str | None = None
    sampling: dict[str, Any] | None = None


class SystemFolder:
    """Reads a system folder. Components are loaded only on request.

    Attributes:
        path: the folder.
        settings: the content of its system.json.

    Raises:
        MossError: it is not a system folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not is_folder(self.path):
            raise MossError(f"{path}: no such folder, expected a system (moss-jax convert or init-random makes one)")
        file = self.path / SYSTEM_FILE
        if not is_file(file):
            raise MossError(
                f"{path}: no {SYSTEM_FILE} in it, expected a system (moss-jax convert or init-random makes one)"
            )
        self.settings: dict[str, Any] = read_json(file)
        found = self.settings.get("format")
        if found != SYSTEM_FORMAT:
            raise MossError(f"{file}: format is {shown(found)}, expected {SYSTEM_FORMAT!r}")
        read_config(_SystemFile, self.settings, file, foreign=True)

    def component_folder(self, name: str) -> Path:
        """The folder of the component `name`, such as "speech_decoder".

        Raises:
            MossError: the system does not have this component.
        """
        path = self.path / name
        if not is_file(path / "config.json"):
            raise MossError(f"{self.path}: has no {name}/config.json; convert the system with all its parts")
        return path

    def has(self, component: Component[Any]) -> bool:
        """Whether there is a folder for this component."""
        return is_folder(self.path / component.name)

    def config(self, component: Component[C]) -> C:
        """The config of a component.

        Raises:
            MossError: the system does not have it, or its config is damaged.
        """
        return component.read_config(self.component_folder(component.name))

    def load(self, component: Component[C], mesh: jax.sharding.Mesh | None = None) -> tuple[C, ComponentParams]:
        """The config and the parameters of a component, see `Component.load`.

        Raises:
            MossError: as `config`.
        """
        return component.load(self.component_folder(component.name), mesh)

    @property
    def text_tokenizer_path(self) -> Path:
        return self.path / "text_tokenizer" / "tokenizer.json"

    def voices(self) -> list[str]:
        """Names of the stored voices, sorted."""
        return sorted(path.stem for path in (self.path / "voices").glob("*.safetensors"))

    def voice_path(self, name: str) -> Path:
        """The file of the voice `name`, which need not exist.

        Raises:
            MossError: `name` cannot be the name of a voice.
        """
        if not VOICE_NAME.fullmatch(name) or len(name.encode()) > MAX_NAME:
            raise MossError(
                f"voice name {shown(name)}: expected letters, digits, '_', '-' and '.' only, at most {MAX_NAME}"
            )
        return self.path / "voices" / f"{name}.safetensors"

    def set_default_voice(self, name: str) -> None:
        """Stores in system.json that this voice speaks where a request names none.

        Raises:
            MossError: there is no such voice, or system.json cannot be written.
        """
        if name not in self.voices():
            raise MossError(f"{self.path}: no voice {name!r}, there are: {', '.join(self.voices()) or 'none'}")
        self.settings = {**self.settings, "default_voice": name}
        write_text(self.path / SYSTEM_FILE, json.dumps(self.settings, indent=2) + "\n")

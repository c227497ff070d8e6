"""A system's folder on disk: where each part lies, its config and its parameters.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moss_jax.checkpoint import load_tree, write_text
from moss_jax.checkpoint.config_io import read_config
from moss_jax.documents import MAX_NAME, read_json, shown
from moss_jax.errors import MossError
from moss_jax.files import is_file, is_folder
from moss_jax.nn.precision import in_32_bits
from moss_jax.sharding import shardings_for
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.flow.model import flow_shapes
from moss_jax.speech_decoder.speaker import speaker_shapes
from moss_jax.speech_decoder.vocoder import vocoder_shapes
from moss_jax.speech_lm import SpeechLMConfig, model_axes, model_shapes
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.text.tokenizer import TextTokenizer

FORMAT = "moss-jax-1"
SYSTEM = "system.json"
NANO = Path(__file__).resolve().parents[1] / "assets" / "nano"  # the system that comes with the package
VOICE_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True)
class Settings:
    """What is used of system.json beside its format; other fields are kept as they are."""

    default_voice: str | None = None
    sampling: dict | None = None


class SystemFolder:
    """Reads one folder; nothing is loaded before it is asked for. Raises MossError when it is no system's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not is_folder(self.path):
            raise MossError(f"{path}: no such folder, expected a system (moss-jax convert or init-random makes one)")
        if not is_file(self.path / SYSTEM):
            raise MossError(f"{path}: no {SYSTEM} in it, expected a system (moss-jax convert or init-random makes one)")
        self.settings = read_json(self.path / SYSTEM)
        if self.settings.get("format") != FORMAT:
            found = self.settings.get("format")
            raise MossError(f"{self.path / SYSTEM}: format is {shown(found)}, expected {FORMAT!r}")
        read_config(Settings, self.settings, self.path / SYSTEM, foreign=True)

    def room(self, name: str) -> Path:
        """The folder of `transformer`, `speech_tokenizer` or `speech_decoder`."""
        path = self.path / name
        if not is_file(path / "config.json"):
            raise MossError(f"{self.path}: has no {name}/config.json; convert the system with all its parts")
        return path

    def config(self, room: str, cls: type) -> Any:
        """The config of a room."""
        path = self.room(room) / "config.json"
        return read_config(cls, read_json(path), str(path))

    def check_codes(self, language_model: SpeechLMConfig | None = None, where: str | None = None) -> None:
        """Checks that language model, speech tokenizer and speech decoder have the same number of speech codes.

        Only configs are read. A component that the folder does not have is not compared, nor is a language model
        without an audio vocabulary.

        Args:
            language_model: config to compare with the codec instead of that of the folder's own language model.
            where: what the message is about, the folder by default.

        Raises:
            MossError: the numbers differ, or a config cannot be read.
        """
        if language_model is None and (self.path / "transformer").is_dir():
            language_model = self.config("transformer", SpeechLMConfig)
        codes: dict[str, int] = {}
        if language_model is not None and language_model.audio_vocab_size:
            codes["the language model"] = language_model.eosp_id
        if (self.path / "speech_tokenizer").is_dir():
            tokenizer = self.config("speech_tokenizer", SpeechTokenizerConfig)
            codes["the speech tokenizer"] = tokenizer.quantize_vocab_size
        if (self.path / "speech_decoder").is_dir():
            decoder = self.config("speech_decoder", SpeechDecoderConfig)
            codes["the speech decoder"] = decoder.flow.codebook_size
        if len(set(codes.values())) > 1:
            found = ", ".join(f"{part} has {count}" for part, count in codes.items())
            raise MossError(f"{where or self.path}: different numbers of speech codes, expected the same: {found}")

    @in_32_bits
    def transformer(self, mesh: jax.sharding.Mesh | None = None) -> tuple[SpeechLMConfig, dict[str, Any]]:
        """Config and nested parameters, on one device or laid out on a mesh."""
        config = self.config("transformer", SpeechLMConfig)
        shapes = model_shapes(config)
        where = None if mesh is None else shardings_for(model_axes(config), shapes, mesh)
        return config, load_tree(self.path / "transformer", shapes, where)

    def speech_decoder(self) -> tuple[SpeechDecoderConfig, "DecoderParts"]:
        """Config and parameters by part, each loaded when it is first asked for."""
        config = self.config("speech_decoder", SpeechDecoderConfig)
        return config, DecoderParts(self.path / "speech_decoder", config)

    def text_tokenizer(self, config: SpeechLMConfig) -> TextTokenizer:
        path = self.path / "text_tokenizer" / "tokenizer.json"
        tokenizer = TextTokenizer.from_file(path)
        tokenizer.check(config, str(path))
        return tokenizer

    def voices(self) -> list[str]:
        """Names of the voices that are stored here."""
        return sorted(path.stem for path in (self.path / "voices").glob("*.safetensors"))

    def voice_path(self, name: str) -> Path:
        """Where the voice `name` lies or would lie; raises MossError for what is not a plain name."""
        if not VOICE_NAME.fullmatch(name) or len(name.encode()) > MAX_NAME:
            raise MossError(
                f"voice name {shown(name)}: expected letters, digits, '_', '-' and '.' only, at most {MAX_NAME}"
            )
        return self.path / "voices" / f"{name}.safetensors"

    def set_default_voice(self, name: str) -> None:
        """From now on the system speaks with this stored voice unless told otherwise."""
        if name not in self.voices():
            raise MossError(f"{self.path}: no voice {name!r}, there are: {', '.join(self.voices()) or 'none'}")
        self.settings = {**self.settings, "default_voice": name}
        write_text(self.path / SYSTEM, json.dumps(self.settings, indent=2) + "\n")


class DecoderParts(Mapping):
    """The parameters of the speech decoder by part: "flow", "flow_chunk_5", "vocoder", "speaker", ..."""

    def __init__(self, folder: Path, config: SpeechDecoderConfig):
        self._folder = folder
        self._config = config
        self._loaded = {}

    @in_32_bits
    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self._loaded:
            path = self._folder / f"{name}.safetensors"
            if not is_file(path):
                raise KeyError(name)
            self._loaded[name] = load_tree(path, self._shapes(name), dtype="float32")  # they may rest in fewer bits
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in self._folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _shapes(self, name: str) -> dict[str, jax.ShapeDtypeStruct]:
        config = self._config
        if name.startswith("flow"):
            return flow_shapes(config.flow)
        if name == "speaker" and config.speaker is None:
            raise KeyError(name)
        return vocoder_shapes(config.vocoder) if name == "vocoder" else speaker_shapes(config.speaker)

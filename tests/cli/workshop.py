"""Bad input for the tests of the verbs: files, recordings, and damaged copies of a system."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from safetensors.numpy import load_file, save_file

RATE = 16000


class Workshop:
    """An empty folder, where a case makes the files that it needs."""

    def __init__(self, folder: Path, system: Path):
        self.folder = folder
        self.system = system

    def path(self, name: str) -> Path:
        return self.folder / name

    def file(self, name: str, content: bytes | str) -> str:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    def wave(self, name: str = "question.wav", samples=None, rate: int = RATE, subtype: str | None = None) -> str:
        samples = 0.1 * np.sin(np.arange(RATE // 2) / 20) if samples is None else np.asarray(samples)
        soundfile.write(self.path(name), samples, rate, subtype=subtype)
        return name

    def copy(self, name: str = "damaged") -> Path:
        """The system again; its files are links, so a file must be replaced, not written into."""
        return Path(shutil.copytree(self.system, self.path(name), copy_function=os.link))

    def replaced(self, inside: str, change: Callable[[bytes], bytes | str]) -> str:
        path = self.copy() / inside
        content = path.read_bytes()
        path.unlink()
        self.file(str(path.relative_to(self.folder)), change(content))
        return "damaged"

    def nested(self, component: str, *path: str, **fields) -> str:
        def change(old):
            config = inner = json.loads(old)
            for name in path:
                inner = inner[name]
            inner.update(fields)
            return json.dumps(config)

        return self.replaced(f"{component}/config.json", change)

    def config(self, component: str, **fields) -> str:
        return self.replaced(f"{component}/config.json", lambda old: json.dumps(json.loads(old) | fields))

    def without(self, inside: str) -> str:
        path = self.copy() / inside
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return "damaged"

    def tensors(self, inside: str, change: Callable[[dict], dict]) -> str:
        path = self.copy() / inside
        tensors = change(load_file(path))
        path.unlink()
        save_file(tensors, path)
        return "damaged"

    def indexed(self, weight_map: dict) -> str:
        """The system with an index in place of the language model's file."""
        component = self.copy() / "transformer"
        (component / "model.safetensors").unlink()
        (component / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return "damaged"

    def sharded(self) -> str:
        """The language model in two shards, of which one is not there."""
        component = self.copy() / "transformer"
        (component / "model.safetensors").rename(component / "model-00001-of-00002.safetensors")
        names = sorted(load_file(component / "model-00001-of-00002.safetensors"))
        files = {name: f"model-0000{1 + (name == names[-1])}-of-00002.safetensors" for name in names}
        (component / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        return "damaged"

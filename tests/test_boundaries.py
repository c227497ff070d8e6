"""Who may know whom: a room imports only the rooms below it, and importing the package imports no model code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "moss_jax"
GROUND = {"errors", "arguments", "documents", "files", "progress", "audio", "nn", "checkpoint", "sharding", "text"}
MODELS = {"speech_tokenizer", "speech_lm", "speech_decoder"}
ALLOWED = {
    "errors": set(),
    "arguments": {"errors"},
    "documents": {"errors"},
    "files": {"errors"},
    "progress": set(),
    "audio": {"errors", "files"},
    "nn": {"errors", "documents", "sharding"},
    "checkpoint": {"errors", "documents", "files", "nn", "sharding"},
    "sharding": {"errors"},
    "text": {"errors", "documents", "files"},
    **{model: GROUND for model in sorted(MODELS)},
    "components": GROUND | MODELS,
    "generate": GROUND | MODELS,
    "dialogue": GROUND | MODELS | {"generate"},
    "convert": GROUND | MODELS | {"components", "generate", "dialogue"},
    "data": GROUND | MODELS | {"components", "generate", "dialogue"},
    "train": GROUND | MODELS | {"components", "generate", "dialogue", "convert", "data"},
    "evaluate": GROUND | MODELS | {"components", "generate", "dialogue", "convert", "data", "train"},
    "compile": GROUND | MODELS | {"components", "generate", "dialogue", "convert", "data", "train"},
    "serve": GROUND | MODELS | {"components", "generate", "dialogue"},
    "recipes": GROUND | MODELS | {"components", "generate", "dialogue", "convert", "data", "train", "evaluate"},
    "cli": GROUND
    | MODELS
    | {"components", "generate", "dialogue", "convert", "data", "train", "evaluate", "compile", "serve", "recipes"},
}


def imported_rooms(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module] if node.module != "moss_jax" else [f"moss_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.startswith("moss_jax.") and not module.startswith("moss_jax.__"):
                yield module.split(".")[1]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_the_rooms_below(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else (PACKAGE / room).rglob("*.py")
    imports = {(str(file.relative_to(PACKAGE)), other) for file in files for other in imported_rooms(file)}
    assert {(file, other) for file, other in imports if other not in ALLOWED[room] | {room}} == set()


def test_every_room_has_a_rule():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert rooms <= set(ALLOWED)


def test_import_is_light():
    code = "import sys, moss_jax; print(sorted({'jax', 'flax', 'librosa', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# These parse what the package itself has just written: a copy of a config, a library's or a child process's answer.
OWN_JSON = {
    "checkpoint/config_io.py",
    "evaluate/results.py",
    "data/tokenize.py",
    "text/byte_level.py",
    "recipes/nano/ablation.py",
    "compile/process.py",
    "compile/measure.py",
}


def test_documents_are_read_in_one_place():
    """Limits, byte-order marks and messages are the business of `documents.py` alone."""
    parsers = ("json.loads(", "json.load(", "yaml.load(", "yaml.safe_load(", 'read_text(encoding="utf-8").splitlines')
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(parser in path.read_text(encoding="utf-8") for parser in parsers)
    }
    assert found - OWN_JSON == {"documents.py"}

"""Import order: a package imports only packages of lower layers, and `import moss_jax` imports no model code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "moss_jax"
GROUND = {
    "errors",
    "arguments",
    "compile_cache",
    "documents",
    "files",
    "progress",
    "audio",
    "nn",
    "checkpoint",
    "sharding",
    "text",
}
MODELS = {"speech_tokenizer", "speech_lm", "speech_decoder"}
ALLOWED = {
    "errors": set(),
    "arguments": {"errors"},
    "documents": {"errors"},
    "files": {"errors"},
    "compile_cache": set(),
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


def imported_packages(path: Path) -> Iterator[str]:
    """The packages and top-level modules of moss_jax that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module] if node.module != "moss_jax" else [f"moss_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.startswith("moss_jax.") and not module.startswith("moss_jax.__"):
                yield module.split(".")[1]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_lower_packages(package):
    files = [PACKAGE / f"{package}.py"] if (PACKAGE / f"{package}.py").exists() else (PACKAGE / package).rglob("*.py")
    imports = {(str(file.relative_to(PACKAGE)), other) for file in files for other in imported_packages(file)}
    assert {(file, other) for file, other in imports if other not in ALLOWED[package] | {package}} == set()


def test_every_package_has_a_rule():
    packages = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert packages <= set(ALLOWED)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports anywhere in it, or names as "module:attribute" to import later."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            # `from package import submodule` does not need what the package's __init__ imports.
            imported |= submodules if len(submodules) == len(node.names) else submodules | {node.module}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            imported.add(node.value.partition(":")[0])
    return imported & modules - {module_name(path)}


def test_no_import_cycles():
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: imported_modules(path, set(paths)) for name, path in paths.items()}
    # What is left after repeatedly removing the modules that import nothing, and those that nothing imports.
    while removed := {name for name in graph if not graph[name] or not any(name in graph[other] for other in graph)}:
        graph = {name: imports - removed for name, imports in graph.items() if name not in removed}
    assert graph == {}


def test_import_is_light():
    code = "import sys, moss_jax; print(sorted({'jax', 'flax', 'librosa', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# These parse JSON that the package itself, a library or a child process has just written, not input from users.
OWN_JSON = {
    "checkpoint/config_io.py",
    "evaluate/results.py",
    "data/build.py",
    "text/byte_level.py",
    "recipes/nano/ablation.py",
    "compile/process.py",
    "compile/measure.py",
}


def test_documents_are_read_in_one_place():
    """Limits, byte-order marks and messages are implemented in `documents.py` only."""
    parsers = ("json.loads(", "json.load(", "yaml.load(", "yaml.safe_load(", 'read_text(encoding="utf-8").splitlines')
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(parser in path.read_text(encoding="utf-8") for parser in parsers)
    }
    assert found - OWN_JSON == {"documents.py"}

"""Files that a release holds and we do not use: carried along verbatim, so that an export has them again."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.files import is_folder


def carry_files(source: Path, target: Path, used: Iterable[str | Path] = ()) -> None:
    """Copies every file below `source` but hidden ones and the `used` (paths in it); nothing in them is looked at."""
    skip = {source / path for path in used}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and path not in skip and not any(part.startswith(".") for part in relative.parts):
            copy_file(path, target / relative)


def copy_file(source: Path, target: Path) -> None:
    """Copies one file, making the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except PermissionError as error:
        if error.filename == str(source):
            raise MossError(f"{source}: cannot be read ({error.strerror})") from error
        raise


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def update_json(path: Path, values: Mapping[str, Any]) -> None:
    """Sets keys of a JSON file."""
    write_json(path, read_json(path) | dict(values))


def tell_unknown(path: Path, known: Iterable[str], say: Callable[[str], None]) -> None:
    """Says which keys of a config.json nothing here understands; they are carried and never an error."""
    if unknown := sorted(set(read_json(path)) - set(known)):
        say(f"note: {path} has keys that are carried but not understood: {', '.join(unknown)}")


def need_folder(path: str | Path, what: str) -> Path:
    path = Path(path)
    if not is_folder(path):
        raise MossError(f"{path}: no such folder, expected {what}")
    return path

"""Copies the files of a release that are not used, so that an export restores them; and JSON files."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.files import is_folder
from moss_jax.progress import Say


def files_to_carry(source: Path, used: Iterable[Path] = (), within: Path | None = None) -> list[Path]:
    """The files below `source` that a conversion copies: all except hidden files and `used`.

    Symbolic links are followed only to files and folders below `within`. In a snapshot of the Hugging Face cache, where
    every file is a link into the `blobs` folder of the repository, that folder is allowed too. A link to a folder is
    not followed inside a folder that was itself reached through a link; this prevents endless recursion.

    Args:
        source: folder of a release, or below `carried/` in a system.
        used: files that are converted; absolute, or relative to the working directory as `source` is.
        within: folder that no link may lead out of; it contains `source`, which is the default.

    Returns:
        Paths relative to `source`, sorted.

    Raises:
        MossError: a link leads out of `within` or is broken, something is neither a file nor a folder, or a folder
            cannot be read.
    """
    within = source if within is None else within
    allowed = _allowed_roots(within)
    _check_link(source, within, allowed)
    # The name itself is not resolved: in a snapshot two names with equal contents are links to the same file.
    skip = {_located(path) for path in used}
    files: list[Path] = []

    def walk(folder: Path, linked: bool) -> None:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or _located(path) in skip:
                continue
            link = path.is_symlink()
            if link:
                _check_link(path, within, allowed)
            if path.is_dir():
                if link and linked:
                    raise MossError(f"{path}: a link to a folder inside a linked folder, which is not followed")
                walk(path, linked or link)
            elif path.is_file():
                files.append(path.relative_to(source))
            else:
                raise MossError(f"{path}: neither a file nor a folder; remove it from the release")

    try:
        walk(source, False)
    except OSError as error:
        raise MossError(f"{error.filename or source}: cannot be read ({error.strerror})") from error
    return files


def carry_files(source: Path, target: Path, used: Iterable[Path] = (), within: Path | None = None) -> None:
    """Copies `files_to_carry(source, used, within)` unchanged into `target`."""
    for path in files_to_carry(source, used, within):
        copy_file(source / path, target / path)


def copy_file(source: Path, target: Path, within: Path | None = None) -> None:
    """Copies a file and creates the folders above the target.

    Args:
        within: folder that a symbolic link must not lead out of; None allows any link.

    Raises:
        MossError: the file cannot be read, or it is a link that leads out of `within`.
    """
    if within is not None:
        _check_link(source, within, _allowed_roots(within))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        if error.filename == str(source):
            raise MossError(f"{source}: cannot be read ({error.strerror})") from error
        raise


def _located(path: Path) -> Path:
    """The absolute path of a file, with links in its folder resolved, but not the file itself."""
    return path.parent.resolve() / path.name


def _allowed_roots(folder: Path) -> list[Path]:
    """The real folders that links in `folder` may lead into."""
    root = folder.resolve()
    roots = [root]
    for part in (root, *root.parents):
        if part.parent.name == "snapshots":  # REPOSITORY/snapshots/COMMIT
            roots.append(part.parent.parent / "blobs")
            break
    return roots


def _check_link(path: Path, within: Path, allowed: list[Path]) -> None:
    """Raises MossError if symbolic links lead from `path` to outside the allowed folders, or are broken."""
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        missing = "a broken symbolic link" if path.is_symlink() else "no such file"
        raise MossError(f"{path}: {missing}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise MossError(f"{path}: a link that cannot be followed ({error})") from error
    if not any(target.is_relative_to(root) for root in allowed):
        raise MossError(
            f"{path}: a symbolic link to {target}, outside {within}; only links inside that folder are followed"
        )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON file and creates the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def update_json(path: Path, values: Mapping[str, Any]) -> None:
    """Sets keys of a JSON file."""
    write_json(path, read_json(path) | dict(values))


def report_unknown_keys(path: Path, known: Iterable[str], say: Say) -> None:
    """Reports the keys of a config.json that are not known; they are kept and are not an error."""
    if unknown := sorted(set(read_json(path)) - set(known)):
        say(f"note: {path} has unknown keys, which are kept but not used: {', '.join(unknown)}")


def require_folder(path: str | Path, what: str) -> Path:
    """The path. Raises MossError if there is no such folder; `what` was expected there."""
    path = Path(path)
    if not is_folder(path):
        raise MossError(f"{path}: no such folder, expected {what}")
    return path

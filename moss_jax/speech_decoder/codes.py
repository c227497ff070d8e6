"""Files of speech codes: the JSON lines that `moss-jax encode` writes, or one array in a .npy."""

import json
from pathlib import Path

import numpy as np

from moss_jax.errors import MossError


def read_codes(path: str | Path) -> list[tuple[str, np.ndarray]]:
    """Reads a file of codes.

    Returns:
        (name, codes int [N]) of each recording; the name is that of its file without ending, or the line's number.

    Raises:
        MossError: no such file, or something in it is not codes.
    """
    path = Path(path)
    if not path.is_file():
        raise MossError(f"{path}: no such file")
    if path.suffix == ".npy":
        try:
            codes = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise MossError(f"{path}: not an array of codes ({error})") from error
        return [(path.stem, _integers(codes, str(path)))]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MossError(f"{path}: not a text file of codes, expected JSON lines or a .npy ({error})") from error
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except ValueError as error:
            raise MossError(f"{where}: not JSON ({error})") from error
        if not isinstance(item, dict) or not isinstance(item.get("codes"), list):
            raise MossError(f'{where}: expected an object with "codes", a list of numbers')
        name = Path(item["path"]).stem if isinstance(item.get("path"), str) else str(number)
        items.append((name, _integers(np.array(item["codes"]), where)))
    if not items:
        raise MossError(f"{path}: no codes in it, expected at least one line")
    return items


def _integers(codes: np.ndarray, where: str) -> np.ndarray:
    if codes.ndim != 1 or not codes.size or not np.issubdtype(codes.dtype, np.integer):
        raise MossError(f"{where}: codes are {codes.dtype} {list(codes.shape)}, expected at least one integer in a row")
    return codes

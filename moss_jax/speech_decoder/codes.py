"""Files of speech codes: the JSON lines that `moss-jax encode` writes, or one array in a .npy file."""

from pathlib import Path

import numpy as np

from moss_jax.documents import MAX_NAME, code_list, located, parse_object, read_lines
from moss_jax.errors import MossError
from moss_jax.files import is_file


def read_codes(path: str | Path) -> list[tuple[str, np.ndarray]]:
    """Reads a file of codes.

    Returns:
        (name, codes int [N]) of each recording. The name is its file name without extension, or the line number.

    Raises:
        MossError: the file does not exist or holds something else than codes.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return [(path.stem, _array(path))]
    items = []
    for line in read_lines(path):
        with located(f"{path} line {line.number}"):
            item = parse_object(line.content)
            if "codes" not in item:
                raise MossError('expected an object with "codes", a list of whole numbers')
            codes = np.array(code_list(item["codes"]), np.int32)
        name = Path(item["path"]).stem if isinstance(item.get("path"), str) else ""
        # A name that cannot be part of a file name is replaced by the line number.
        fits = name and "\0" not in name and len(name.encode()) <= MAX_NAME
        items.append((name if fits else str(line.number), codes))
    if not items:
        raise MossError(f"{path}: no codes, expected at least one line")
    return items


def _array(path: Path) -> np.ndarray:
    if not is_file(path):
        raise MossError(f"{path}: no such file")
    try:
        # Memory-mapped, so that a damaged header cannot ask for more memory than the file has bytes.
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy evaluates the header, which can fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MossError(f"{path}: not an array of codes ({reason[:200]})") from error
    if not isinstance(codes, np.ndarray):
        raise MossError(f"{path}: an archive of arrays, expected a single array of codes")
    if codes.ndim != 1 or not codes.size or not np.issubdtype(codes.dtype, np.integer):
        raise MossError(f"{path}: codes are {codes.dtype} {list(codes.shape)}, expected at least one integer in a row")
    return np.array(codes)

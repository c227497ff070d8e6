"""Access to the developer tools in `dev/`, which are in a clone of the repository but not in the wheel."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from moss_jax.errors import MossError


def import_dev(name: str) -> ModuleType:
    """Imports `dev.NAME` from the clone that contains this package, or else from the working directory.

    Raises:
        MossError: neither is a clone of the repository.
    """
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "dev" / name / "__init__.py").is_file():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return importlib.import_module(f"dev.{name}")
    raise MossError(f"the developer tools (dev/{name}) are not installed; run it in a clone of the repository")

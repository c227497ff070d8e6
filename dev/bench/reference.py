"""The reference classes from a checkout of OpenMOSS/MOSS-Speech, without modules that inference does not use."""

import importlib
import logging
import sys
import types
from pathlib import Path
from typing import Any

from moss_jax.errors import MossError

# Imported but never called by the modules that we need: language models, the pipeline of the demo, training utilities.
UNUSED = ("cosyvoice.llm.llm", "cosyvoice.cli.model", "matcha.utils", "matcha.utils.pylogger")


class _Unused(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def reference_module(checkout: Path, name: str) -> types.ModuleType:
    """Imports `cosyvoice.*` or `matcha.*` from a checkout that contains Matcha-TTS or has it as a sibling.

    Raises:
        MossError: the checkout lacks one of the two, or a package that they need is not installed.
    """
    places = [checkout / "third_party" / "Matcha-TTS", checkout / "Matcha-TTS", checkout.parent / "Matcha-TTS"]
    matcha = next((place for place in places if (place / "matcha").is_dir()), None)
    if matcha is None or not (checkout / "cosyvoice").is_dir():
        raise MossError(f"{checkout}: expected a checkout of MOSS-Speech with its Matcha-TTS (cosyvoice/, matcha/)")
    for place in (matcha, checkout):
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
    for unused in UNUSED:
        sys.modules.setdefault(unused, _Unused(unused))
    setattr(sys.modules["matcha.utils.pylogger"], "get_pylogger", logging.getLogger)  # noqa: B010, not a known name
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MossError(f"{checkout}: {name} cannot be imported ({error})") from error

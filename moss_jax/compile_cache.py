"""Where compiled programs and converted models are cached between runs."""

import os
from pathlib import Path

DEFAULT_CACHE = "~/.cache/moss_jax"


def cache_folder() -> Path:
    """MOSS_JAX_CACHE, or ~/.cache/moss_jax. The folder may not exist yet."""
    return Path(os.environ.get("MOSS_JAX_CACHE") or DEFAULT_CACHE).expanduser()


def compiled_folder() -> str | None:
    """The folder in which JAX stores compiled programs; None: it stores none."""
    import jax

    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # options of jax.config have no types


def enable_compile_cache() -> None:
    """Stores compiled programs in the cache folder, so that the next process does not compile them again.

    A folder that the user has given to JAX (JAX_COMPILATION_CACHE_DIR) is left as it is.
    """
    import jax

    if not compiled_folder():
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))

"""The --model and --codec of every verb that needs a system, and where conversions are kept."""

import os
import sys
from pathlib import Path

DEFAULT_CACHE = "~/.cache/moss_jax"


def add_system_arguments(parser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="FOLDER",
        help="a system folder (moss-jax convert, moss-jax init-random), or a released language model: "
        "a folder or a hub name such as fnlp/MOSS-Speech",
    )  # fmt: skip
    parser.add_argument(
        "--codec", metavar="FOLDER",
        help="the released codec, a folder or a hub name such as fnlp/MOSS-Speech-Codec; only beside a released "
        "language model. The pair is converted once, into MOSS_JAX_CACHE or ~/.cache/moss_jax",
    )  # fmt: skip


def system_folder(args) -> Path:
    """The system folder that the arguments mean; converts a released pair on first use.

    What is compiled is kept beside the conversions, so that the next run starts sooner.
    """
    import jax

    from moss_jax.convert.system import resolve

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    return resolve(args.model, args.codec, cache_folder(), progress)


def cache_folder() -> Path:
    return Path(os.environ.get("MOSS_JAX_CACHE") or DEFAULT_CACHE).expanduser()


def say(line: str) -> None:
    """Everything that is no result goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def progress(line: str) -> None:
    """How far long work is: for a person who watches. Notes are for everybody, so that an error stays the first line
    of what a program reads on stderr."""
    if line.startswith("note:") or sys.stderr.isatty():
        say(line)

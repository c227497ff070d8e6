"""The --model and --codec of every verb that needs a system, and where conversions are kept."""

import contextlib
import sys
from pathlib import Path

from moss_jax.compile_cache import cache_folder, enable_compile_cache
from moss_jax.errors import MossError


def add_system_arguments(parser, nano: bool = False) -> None:
    """`nano`: without --model the verb takes the system that comes with the package."""
    parser.add_argument(
        "--model",
        required=not nano,
        default=None,
        metavar="FOLDER",
        help="a system folder (moss-jax convert, moss-jax init-random), or a released language model: "
        "a folder or a hub name such as fnlp/MOSS-Speech" + ("; default: the bundled nano model" if nano else ""),
    )
    parser.add_argument(
        "--codec",
        metavar="FOLDER",
        help="the released codec, a folder or a hub name such as fnlp/MOSS-Speech-Codec; only beside a released "
        "language model. The pair is converted once, into MOSS_JAX_CACHE or ~/.cache/moss_jax",
    )
    add_revision_arguments(parser)


def add_revision_arguments(parser) -> None:
    """Which version of a repository on the Hugging Face Hub is taken."""
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a model on the Hugging Face Hub (default: main)"
    )
    parser.add_argument("--codec-revision", metavar="REV", help="the same for --codec")


def add_audio_limit(parser) -> None:
    """The flag that lifts the limit of recordings, `args.max_audio_mib`."""
    parser.add_argument(
        "--max-audio-mib",
        type=int,
        default=2048,
        metavar="N",
        help="refuse a recording with more than N MiB of decoded samples, 4 bytes for each sample of each channel "
        "(default 2048: 3 hours of mono or 1.5 hours of stereo sound at 48 kHz)",
    )


def system_folder(args) -> Path:
    """The system folder that the arguments mean; converts a released pair on first use.

    What is compiled is kept beside the conversions, so that the next run starts sooner.
    """
    from moss_jax.checkpoint.system_folder import NANO_FOLDER
    from moss_jax.convert.resolve import resolve_system

    enable_compile_cache()
    if args.model is None:
        for name in ("codec", "revision", "codec_revision"):
            if getattr(args, name) is not None:
                raise MossError(f"--{name.replace('_', '-')}: is used together with --model, which is missing")
        return NANO_FOLDER
    check_revisions(args)
    return resolve_system(args.model, args.codec, cache_folder(), progress, args.revision, args.codec_revision)


def check_revisions(args) -> None:
    """Raises MossError when there is a revision of a codec and no codec."""
    if args.codec_revision is not None and args.codec is None:
        raise MossError("--codec-revision: is used together with --codec, which is missing")


def say(line: str) -> None:
    """Everything that is no result goes to stderr."""
    with contextlib.suppress(OSError):  # a full or closed stderr does not stop the work
        print(line, file=sys.stderr, flush=True)


def progress(line: str) -> None:
    """How far long work is: for a person who watches. Notes are for everybody, so that an error stays the first line
    of what a program reads on stderr."""
    if line.startswith("note:") or sys.stderr.isatty():
        say(line)

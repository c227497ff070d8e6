"""What several verbs share: arguments, the system that they name, and lines on standard error."""

import argparse
import contextlib
import sys
from pathlib import Path

from moss_jax.compile_cache import DEFAULT_CACHE, cache_folder, enable_compile_cache
from moss_jax.errors import MossError


def add_system_arguments(parser: argparse.ArgumentParser, nano: bool = False) -> None:
    """Adds --model, --codec and their revisions.

    Args:
        nano: --model is optional; the default is the bundled nano model.
    """
    parser.add_argument(
        "--model",
        required=not nano,
        default=None,
        metavar="FOLDER",
        help="a system folder (from moss-jax convert or init-random), or a released language model: a folder or a "
        "Hugging Face Hub name such as fnlp/MOSS-Speech" + (" (default: the bundled nano model)" if nano else ""),
    )
    parser.add_argument(
        "--codec",
        metavar="FOLDER",
        help="the codec of a released language model: a folder or a Hub name such as fnlp/MOSS-Speech-Codec. The pair "
        f"is converted once and cached in MOSS_JAX_CACHE (default: {DEFAULT_CACHE})",
    )
    add_revision_arguments(parser)


def add_revision_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --revision and --codec-revision."""
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of --model on the Hugging Face Hub (default: main)"
    )
    parser.add_argument("--codec-revision", metavar="REV", help="branch, tag or commit of --codec on the Hub")


def add_audio_limit(parser: argparse.ArgumentParser) -> None:
    """Adds --max-audio-mib; `max_audio_bytes` reads it."""
    parser.add_argument(
        "--max-audio-mib",
        type=int,
        default=2048,
        metavar="N",
        help="reject recordings above N MiB when decoded, at 4 bytes per sample and channel (default: 2048, which is "
        "3 hours of mono or 1.5 hours of stereo at 48 kHz)",
    )


def max_audio_bytes(args: argparse.Namespace) -> int:
    """The limit of `add_audio_limit` in bytes."""
    return args.max_audio_mib * 2**20


def system_folder(args: argparse.Namespace) -> Path:
    """The system folder that the arguments name. A released pair is converted on first use.

    Also enables the persistent compilation cache, which every verb with a system needs.

    Raises:
        MossError: the arguments contradict each other, or no system was found.
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


def check_revisions(args: argparse.Namespace) -> None:
    """Raises MossError if --codec-revision is given without --codec."""
    if args.codec_revision is not None and args.codec is None:
        raise MossError("--codec-revision: is used together with --codec, which is missing")


def say(line: str) -> None:
    """Writes a line to standard error, where everything goes that is not a result."""
    with contextlib.suppress(OSError):  # a full or closed stderr does not stop the work
        print(line, file=sys.stderr, flush=True)


def progress(line: str) -> None:
    """Writes a line of progress if standard error is a terminal; notes ("note: ...") are always written.

    So an error is the first line on standard error for programs that read it.
    """
    if line.startswith("note:") or sys.stderr.isatty():
        say(line)

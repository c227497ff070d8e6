"""`moss-jax VERB ...`: one file a verb, no logic. A verb's file has a docstring that teaches it,
`add_arguments(parser)` and `run(args)`."""

import argparse
import contextlib
import errno
import importlib
import os
import sys
from typing import TextIO

from moss_jax.documents import short
from moss_jax.errors import MossError

VERBS = {
    "bench": "time a part beside a PyTorch peer",
    "chat": "ask a question, spoken or written, and get an answer",
    "compile": "compile for an absent TPU: seconds, memory a chip, collectives",
    "convert": "checkpoints into a system folder, and back",
    "corpus": "make a small corpus of spoken facts with espeak-ng",
    "decode": "turn codes into sound",
    "demo": "talk to a system in the browser",
    "encode": "turn recordings into codes",
    "eval": "measure on files: likelihoods, multiple choice, spoken questions, resynthesis",
    "export": "a checkpoint of a run as a system folder",
    "info": "what is inside a folder",
    "init-random": "write a complete system with random weights",
    "parity": "compare components with golden files",
    "plot": "draw the loss curves of runs",
    "similarity": "where speech and text look alike inside the model, layer by layer",
    "tokenize": "turn a manifest into a data set to train on",
    "train": "train a language model",
    "train-nano": "train the small system nano from nothing, all of it",
    "voice": "enrol a voice from a recording",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else here does."""

    def print_help(self, file: TextIO | None = None) -> None:
        """As argparse does it, but a stdout that cannot be written is an error."""
        print(self.format_help(), end="", file=file or sys.stdout)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0 done, 1 a check failed, 2 bad input (one line on stderr says what)."""
    argv = sys.argv[1:] if argv is None else argv
    asked = next((a for a in argv if not a.startswith("-")), None)
    _prepare_streams()
    try:
        try:
            code = _run(argv, asked)
        except SystemExit:  # of the parser, which may have printed help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except MossError as error:
        return _refuse(asked, str(error))
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        _discard_output()
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        _discard_output()
        where = "" if error.filename is None else f"{short(os.fsdecode(error.filename))}: "
        full = "; standard output or a disk is full" if error.errno == errno.ENOSPC else ""
        return _refuse(asked, f"{where}{error.strerror}{full}")
    except MemoryError as error:
        return _refuse(asked, f"not enough memory ({error})" if str(error) else "not enough memory")
    except (RuntimeError, AssertionError):
        if (reason := _backend_failure()) is None:
            raise
        return _refuse(asked, reason)
    except KeyboardInterrupt:
        _refuse(asked, "interrupted")
        return 130


def _run(argv: list[str], asked: str | None) -> int:
    parser = Parser(
        prog="moss-jax",
        description="MOSS-Speech in JAX: speech in, speech out.",
        epilog="`moss-jax VERB --help` explains a verb.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb, help_text in VERBS.items():
        subparser = verbs.add_parser(verb, help=help_text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if verb == asked:  # only the verb that runs is imported, so that --help stays instant
            module = importlib.import_module(f"moss_jax.cli.{verb.replace('-', '_')}")
            subparser.description = module.__doc__
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.version:
        from moss_jax import __version__

        print(f"moss-jax {__version__}")
        return 0
    if args.verb is None:
        parser.print_help()
        return 2
    if os.environ.get("JAX_ENABLE_X64"):
        import jax

        jax.config.update("jax_enable_x64", False)  # training too is defined in 32 bits, in every thread
    return args.run(args) or 0


def _prepare_streams() -> None:
    """Makes stdout and stderr safe to write to: a closed one exists, and no character is an error.

    Python sets a stream to None when its descriptor is closed. Then `print(..., file=sys.stderr)` would write to
    stdout, and a file that is opened later would get the descriptor.
    """
    if sys.stdout is None:
        # Not open for writing: what is written fails, as it does for other programs with a closed stdout.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    # A file name that is not UTF-8, or a terminal that lacks a character, gets the escape that Python uses on stderr.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _refuse(verb: str | None, message: str) -> int:
    """Prints the error and returns the exit code for bad input."""
    with contextlib.suppress(OSError):  # a full or closed stderr must not change the exit code
        print(f"moss-jax{f' {verb}' if verb else ''}: {message}", file=sys.stderr, flush=True)
    return 2


def _discard_output() -> None:
    """Sends what stdout still holds to nowhere, so that the interpreter does not fail to write it at its end."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _backend_failure() -> str | None:
    """Why JAX cannot start the backend that it is asked for; None when it has started or is not in use."""
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    try:
        jax.devices()
    except Exception as error:  # RuntimeError, or an AssertionError without text where a plugin is missing
        platform = os.environ.get("JAX_PLATFORMS") or "default"
        reason = str(error).splitlines()[0] if str(error) else "no such device, or its plugin is not installed"
        return f"JAX cannot start its {platform} backend: {reason}"
    return None

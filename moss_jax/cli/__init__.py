"""The command line, `moss-jax VERB ...`.

Each verb is a module of this package: its docstring is the text of `--help`, `add_arguments(parser)` declares its
arguments, and `run(args)` does the work and returns the exit code. A module is imported only when its verb
runs.
"""

import argparse
import contextlib
import errno
import importlib
import os
import sys
from typing import Any, NoReturn

from moss_jax.documents import short
from moss_jax.errors import MossError

VERBS = {
    "bench": "measure the speed of a part against PyTorch",
    "chat": "answer spoken or written questions",
    "compile": "compile for a TPU that is not present: time, memory per chip, collectives",
    "convert": "convert checkpoints into a system folder, and back",
    "corpus": "synthesise a small corpus of spoken facts with espeak-ng",
    "decode": "decode speech codes into audio",
    "demo": "serve the web demo",
    "encode": "encode recordings into speech codes",
    "eval": "evaluate a system: likelihoods, multiple choice, spoken questions, resynthesis",
    "export": "export a checkpoint of a run as a system folder",
    "info": "describe a system folder or a released folder",
    "init-random": "create a complete system with random weights",
    "parity": "compare components with golden files",
    "plot": "plot the loss curves of runs",
    "similarity": "measure the similarity of speech and text in each layer",
    "tokenize": "turn a manifest into a training data set",
    "train": "train a language model, the speech tokenizer or the speech decoder",
    "train-nano": "train nano, the small bundled system, from scratch",
    "voice": "enrol a voice from a recording",
}

EXIT_BAD_INPUT = 2
EXIT_READER_CLOSED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all other errors of the command line."""

    def print_help(self, file: Any = None) -> None:
        """Like argparse, except that a standard output that cannot be written is an error."""
        print(self.format_help(), end="", file=file or sys.stdout)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one verb.

    Returns:
        The exit code: 0 success, 1 a check failed or the reader closed the pipe, 2 bad input or an error of the machine
        (explained in one line on standard error), 130 interrupted. `moss-jax train` has further codes.

    Raises:
        SystemExit: from argparse, after --help or an invalid argument.
    """
    argv = sys.argv[1:] if argv is None else argv
    verb = next((argument for argument in argv if not argument.startswith("-")), None)
    _prepare_streams()
    try:
        try:
            code = _run(argv, verb)
        except SystemExit:  # from the parser, which may have printed the help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except MossError as error:
        return _fail(verb, str(error))
    except BrokenPipeError:  # reader closed the pipe (e.g. head)
        _discard_output()
        return EXIT_READER_CLOSED
    except OSError as error:
        if error.errno is None:
            raise
        _discard_output()
        path = "" if error.filename is None else f"{short(os.fsdecode(error.filename))}: "
        hint = "; standard output or a disk is full" if error.errno == errno.ENOSPC else ""
        return _fail(verb, f"{path}{error.strerror}{hint}")
    except MemoryError as error:
        return _fail(verb, f"not enough memory ({error})" if str(error) else "not enough memory")
    except (RuntimeError, AssertionError) as error:
        reason = _device_memory_failure(error) or _backend_failure()
        if reason is None:
            raise
        return _fail(verb, reason)
    except KeyboardInterrupt:
        _fail(verb, "interrupted")
        return EXIT_INTERRUPTED


def _run(argv: list[str], verb: str | None) -> int:
    parser = Parser(
        prog="moss-jax",
        description="MOSS-Speech in JAX: a spoken dialogue model.",
        epilog="Run `moss-jax VERB --help` for the options of a verb and examples.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, help_text in VERBS.items():
        subparser = verbs.add_parser(name, help=help_text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == verb:  # importing all verbs would take seconds
            module = importlib.import_module(f"moss_jax.cli.{name.replace('-', '_')}")
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
        return EXIT_BAD_INPUT
    if os.environ.get("JAX_ENABLE_X64"):
        import jax

        jax.config.update("jax_enable_x64", False)  # all models, and training in every thread, are defined in 32 bits
    return args.run(args)


def _prepare_streams() -> None:
    """Makes standard output and error safe to write to: each exists, and every character can be written.

    Python sets a stream to None when its descriptor is closed. `print(..., file=sys.stderr)` would then write to
    standard output, and a file opened later would get the descriptor.
    """
    if sys.stdout is None:
        # Opened read-only, so that writing fails, as it does for other programs with a closed standard output.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    # File names that are not UTF-8, and characters that the terminal lacks, are escaped as Python does on stderr.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(verb: str | None, message: str) -> int:
    """Prints an error and returns the exit code for bad input."""
    with contextlib.suppress(OSError):  # a full or closed stderr must not change the exit code
        print(f"moss-jax{f' {verb}' if verb else ''}: {message}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


def _discard_output() -> None:
    """Redirects standard output to nowhere, so that the interpreter's flush at exit does not fail a second time."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _device_memory_failure(error: BaseException) -> str | None:
    """The error line for an allocation that failed on a device; None for other errors."""
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    status, _, reason = str(error).partition(": ")  # XLA puts the name of the status first
    if status != "RESOURCE_EXHAUSTED":
        return None
    return f"not enough memory on the device: {reason.partition(chr(10))[0] or 'no details from JAX'}"


def _backend_failure() -> str | None:
    """The error line for a JAX backend that cannot start; None if it has started or JAX is not in use."""
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    try:
        jax.devices()
    except Exception as error:  # RuntimeError, or an AssertionError without a message if a plugin is missing
        platform = os.environ.get("JAX_PLATFORMS") or "default"
        reason = str(error).splitlines()[0] if str(error) else "no such device, or its plugin is not installed"
        return f"JAX cannot start its {platform} backend: {reason}"
    return None

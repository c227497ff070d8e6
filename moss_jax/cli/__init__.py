"""`moss-jax VERB ...`: one file a verb, no logic. A verb's file has a docstring that teaches it,
`add_arguments(parser)` and `run(args)`."""

import argparse
import importlib
import os
import sys

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

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0 done, 1 a check failed, 2 bad input (one line on stderr says what)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="moss-jax", description="MOSS-Speech in JAX: speech in, speech out.",
        epilog="`moss-jax VERB --help` explains a verb.",
    )  # fmt: skip
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    asked = next((a for a in argv if not a.startswith("-")), None)
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
    try:
        return args.run(args) or 0
    except MossError as error:
        print(f"moss-jax {args.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"moss-jax {args.verb}: interrupted", file=sys.stderr)
        return 130

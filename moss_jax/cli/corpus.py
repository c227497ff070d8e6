"""Synthesise a small corpus of spoken facts with espeak-ng, for training without data of your own.

  moss-jax corpus CORPUS --utterances 200 --recordings a.wav b.wav      sums, capitals and colours
  moss-jax corpus CORPUS --nano                                         the corpus of the nano recipe (docs/nano.md)

Writes sound files and manifests for `moss-jax tokenize`: text, speech with word times, and spoken and written
conversations. The corpus of nano has hours of questions in a dozen voices, and answers in one voice. It is made on all
CPU cores; if interrupted, rerun the same command to resume. Needs pip install 'moss-jax[espeak]'.
"""

import argparse
import sys

from moss_jax.arguments import check_seed
from moss_jax.cli.system_arguments import progress
from moss_jax.errors import MossError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="CORPUS", help="a folder that does not exist yet")
    parser.add_argument(
        "--utterances", type=int, metavar="N", help="recordings of facts, and as many conversations (default: 200)"
    )
    parser.add_argument("--recordings", nargs="*", default=[], metavar="FILE", help="sound files to include")
    parser.add_argument("--nano", action="store_true", help="the corpus of the nano recipe")
    parser.add_argument("--scale", type=float, help="with --nano: fraction of the corpus to synthesise (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts and voices (default: 0)")


def run(args: argparse.Namespace) -> int:
    check_seed(args.seed, "--seed")

    if args.nano:
        from moss_jax.recipes.nano.corpus import make_nano_corpus

        if args.utterances is not None or args.recordings:
            raise MossError("--nano goes without --utterances and --recordings; --scale sets its size")
        make_nano_corpus(args.folder, 1.0 if args.scale is None else args.scale, args.seed, progress=_report)
    else:
        from moss_jax.data.corpus import make_corpus

        if args.scale is not None:
            raise MossError("--scale goes with --nano, which is missing")
        utterances = 200 if args.utterances is None else args.utterances
        make_corpus(args.folder, utterances, args.seed, args.recordings, _report)
    print(args.folder)
    return 0


def _report(done: int, total: int) -> None:
    if done == total or (sys.stderr.isatty() and done % 10 == 0):
        progress(f"{done} of {total} utterances")

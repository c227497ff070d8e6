"""Make a corpus of spoken facts with espeak-ng, to train on where there is no data.

  moss-jax corpus CORPUS --utterances 200 --recordings a.wav b.wav      a small one: sums, capitals, colours
  moss-jax corpus CORPUS --nano                                         the one of the nano recipe (docs/nano.md)

Writes sound files and manifests for `moss-jax tokenize`: text, speech with the times of its words, conversations spoken
and written. Nano's has questions in a dozen voices, hours of them, and one voice that answers; it is made on all cores,
and the same command goes on where it was stopped. It needs pip install 'moss-jax[espeak]'.
"""

import sys

from moss_jax.arguments import check_seed
from moss_jax.cli.system_arguments import progress
from moss_jax.errors import MossError


def add_arguments(parser):
    parser.add_argument("folder", metavar="CORPUS", help="a folder that is not there yet")
    parser.add_argument("--utterances", type=int, help="recordings of facts, and as many conversations, default 200")
    parser.add_argument("--recordings", nargs="*", default=[], metavar="FILE", help="other sound files to take in")
    parser.add_argument("--nano", action="store_true", help="the corpus of the nano recipe")
    parser.add_argument("--scale", type=float, help="with --nano: how much of it is spoken, default 1")
    parser.add_argument("--seed", type=int, default=0, help="of what is said and by whom, default 0")


def run(args) -> int:
    check_seed(args.seed, "--seed")

    def told(done: int, total: int) -> None:
        if done == total or (sys.stderr.isatty() and done % 10 == 0):
            progress(f"{done} of {total} utterances")

    if args.nano:
        from moss_jax.recipes.nano.corpus import make_nano_corpus

        if args.utterances is not None or args.recordings:
            raise MossError("--nano goes without --utterances and --recordings; --scale says how much is spoken")
        make_nano_corpus(args.folder, 1.0 if args.scale is None else args.scale, args.seed, progress=told)
    else:
        from moss_jax.data.corpus import make_corpus

        if args.scale is not None:
            raise MossError("--scale goes with --nano")
        utterances = 200 if args.utterances is None else args.utterances
        make_corpus(args.folder, utterances, args.seed, args.recordings, told)
    print(args.folder)
    return 0

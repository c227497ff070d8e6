"""Make a small corpus of spoken facts (sums, capitals, colours) with espeak-ng, to train on where there is no data.

  moss-jax corpus CORPUS --utterances 200 --recordings a.wav b.wav

Writes sound files and manifests for `moss-jax tokenize`: text, speech with the times of its words, conversations spoken
and written. Debian: apt install espeak-ng.
"""

import sys

from moss_jax.cli.system_arguments import progress


def add_arguments(parser):
    parser.add_argument("folder", metavar="CORPUS", help="a folder that is not there yet")
    parser.add_argument(
        "--utterances", type=int, default=200, help="recordings of facts, and as many conversations, default 200"
    )
    parser.add_argument("--recordings", nargs="*", default=[], metavar="FILE", help="other sound files to take in")
    parser.add_argument("--seed", type=int, default=0, help="of what is said and by whom, default 0")


def run(args) -> int:
    from moss_jax.data.corpus import make_corpus

    def told(done: int, total: int) -> None:
        if done == total or (sys.stderr.isatty() and done % 10 == 0):
            progress(f"{done} of {total} utterances")

    make_corpus(args.folder, args.utterances, args.seed, args.recordings, told)
    print(args.folder)
    return 0

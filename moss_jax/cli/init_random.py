"""Create a complete system with random weights, without a download.

  moss-jax init-random FOLDER                          a tiny one of 4 MB, to try every verb
  moss-jax init-random FOLDER --size 8b                the released sizes, 21 GB
  moss-jax init-random FOLDER --layout released        FOLDER/MOSS-Speech and FOLDER/MOSS-Speech-Codec as released

The replies of such a system are noise. The released layout needs torch and onnx: pip install 'moss-jax[convert]'.
"""

import argparse

from moss_jax.cli.system_arguments import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--size", default="tiny", help="tiny, 0.6b or 8b (default: tiny)")
    parser.add_argument(
        "--layout", default="ours", help="ours: a system folder; released: the two released folders (default: ours)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")


def run(args: argparse.Namespace) -> int:
    from moss_jax.convert.random_system import init_random

    init_random(args.folder, args.size, args.layout, args.seed, progress)
    print(args.folder)
    return 0

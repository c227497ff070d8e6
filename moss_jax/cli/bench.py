"""Measure the speed of a part against a PyTorch implementation, in the same run on the same machine.

  moss-jax bench lm
  moss-jax bench flow --reference CHECKOUT

Prints a Markdown table with the median time, the fastest and slowest run, and the ratio peer / ours (above 1: ours is
faster). The language model is compared with Hugging Face transformers if it is installed. Flow, vocoder and speech
tokenizer are compared with the reference classes if --reference names a checkout of OpenMOSS/MOSS-Speech with its
submodule. Weights are random; speed does not depend on their values.
"""

import argparse
from pathlib import Path

from moss_jax.cli.clone import import_dev
from moss_jax.errors import MossError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = import_dev("bench").PARTS
    parser.add_argument("part", choices=list(parts), help="; ".join(f"{k}: {v}" for k, v in parts.items()))
    parser.add_argument("--size", default="full", help="model size: full, mid or tiny (default: full)")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed runs of each side (default: 5)")
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT", help="checkout of the reference sources")
    parser.add_argument("--no-peer", action="store_true", help="measure only our implementation")


def run(args: argparse.Namespace) -> int:
    bench = import_dev("bench")
    if args.repeats < 1:
        raise MossError(f"--repeats is {args.repeats}, expected at least 1")
    if args.reference and not args.reference.is_dir():
        raise MossError(f"--reference {args.reference}: no such directory, expected a checkout of OpenMOSS/MOSS-Speech")
    options = bench.Options(args.size, args.repeats, args.reference, not args.no_peer)
    print(bench.machine(), flush=True)
    rows = []
    for row in bench.run(args.part, options):
        print("  ".join(cell for cell in row.cells() if cell), flush=True)
        rows.append(row)
    print("\n" + bench.table(rows))
    return 0

"""Time a part of the system beside a PyTorch peer, in the same run on the same machine.

  moss-jax bench lm
  moss-jax bench flow --reference CHECKOUT

Prints a markdown table: median seconds with the smallest and largest, and the ratio peer / ours (above 1: ours is
faster). The language model is compared with transformers where it is installed. Flow, vocoder and speech tokenizer are
compared with the reference classes when --reference names a checkout of OpenMOSS/MOSS-Speech with its submodule.
Weights are random: speed does not depend on them.
"""

from pathlib import Path

from moss_jax.cli.clone import import_dev
from moss_jax.errors import MossError


def add_arguments(parser):
    parts = import_dev("bench").PARTS
    parser.add_argument("part", choices=list(parts), help="; ".join(f"{k}: {v}" for k, v in parts.items()))
    parser.add_argument("--size", default="full", help="model size: full (default), mid or tiny")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side (default 5)")
    parser.add_argument("--reference", type=Path, help="checkout of the reference sources")
    parser.add_argument("--no-peer", action="store_true", help="time only ours")


def run(args):
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

"""Plot the loss curves of runs.

  moss-jax plot runs/stage1 runs/stage2 runs/sft -o curves.png

The runs are drawn side by side in one figure.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="a .png, .svg or .pdf file")


def run(args: argparse.Namespace) -> int:
    from moss_jax.train.plot import plot_runs

    plot_runs(args.folders, args.output)
    print(args.output)
    return 0

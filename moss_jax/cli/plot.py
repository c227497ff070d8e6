"""Draw the loss curves of runs side by side.

moss-jax plot runs/stage1 runs/stage2 runs/sft -o curves.png
"""


def add_arguments(parser):
    parser.add_argument("folders", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=".png, .svg or .pdf")


def run(args) -> int:
    from moss_jax.train.plot import plot_runs

    plot_runs(args.folders, args.output)
    print(args.output)
    return 0

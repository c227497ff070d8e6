"""Write a complete system with random weights: no download, every part in its place, and what it says is noise.

moss-jax init-random FOLDER                          a tiny one, 4 MB, for trying every verb
moss-jax init-random FOLDER --size 8b                the released sizes, 21 GB
moss-jax init-random FOLDER --layout released        FOLDER/MOSS-Speech and FOLDER/MOSS-Speech-Codec as released
                                                     (needs torch and onnx: pip install 'moss-jax[convert]')
"""

from moss_jax.cli.system_arguments import progress


def add_arguments(parser):
    parser.add_argument("folder", metavar="FOLDER", help="a folder that is not there yet, or is empty")
    parser.add_argument("--size", default="tiny", help="tiny (default), 0.6b or 8b")
    parser.add_argument("--layout", default="ours", help="ours (default): a system folder; released: the two folders")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights, default 0")


def run(args) -> int:
    from moss_jax.convert.random_system import init_random

    init_random(args.folder, args.size, args.layout, args.seed, progress)
    print(args.folder)
    return 0

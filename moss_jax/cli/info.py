"""What is inside a folder: parts, parameters, sizes, voices; and where the tensor names that we read come from.

moss-jax info SYSTEM              a system folder
moss-jax info MOSS-Speech-Codec   a released folder (.pt and .onnx files need 'moss-jax[convert]')
moss-jax info FOLDER --names      also every name of our tables that no one has seen in a real file
"""


def add_arguments(parser):
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--names", action="store_true", help="list the tensor names that were not seen in a real file")


def run(args) -> int:
    from moss_jax.convert.describe import describe

    for line in describe(args.folder, args.names):
        print(line)
    return 0

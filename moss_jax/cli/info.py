"""Describe a system folder or a released folder.

  moss-jax info SYSTEM              a system folder
  moss-jax info MOSS-Speech-Codec   a released folder (.pt and .onnx files need pip install 'moss-jax[convert]')
  moss-jax info FOLDER --names      also list the tensor names that were not verified against a real file

Prints components, sizes and voices, and where the tensor names of the conversion come from.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a system folder or a released folder")
    parser.add_argument("--names", action="store_true", help="list the unverified tensor names")


def run(args: argparse.Namespace) -> int:
    from moss_jax.convert.describe import describe

    for line in describe(args.folder, args.names):
        print(line)
    return 0

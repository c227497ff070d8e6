"""Convert checkpoints into a system folder, and back.

  moss-jax convert --model MOSS-Speech --codec MOSS-Speech-Codec -o SYSTEM     from the two released folders
  moss-jax convert --from-qwen3 Qwen3-8B -o SYSTEM                             a language model to be trained
  moss-jax convert --from-qwen3 Qwen3-8B --split 4 --codec MOSS-Speech-Codec -o SYSTEM
  moss-jax convert --from-qwen3 Qwen3-8B --codec OTHER_SYSTEM -o SYSTEM        with the codec and voices of a system
  moss-jax convert --model SYSTEM --export released -o FOLDER                  back to the two released folders
  moss-jax convert --model SYSTEM --export qwen3 -o FOLDER                     the text path as a Qwen3

--model, --codec and --from-qwen3 take folders or Hugging Face Hub names such as fnlp/MOSS-Speech; --revision and
--codec-revision select a branch, tag or commit. The codec determines the number of speech codes. A round trip preserves
every tensor bit for bit. If anything does not match, all mismatches are listed and nothing is written. No code from a
checkpoint is executed, and symbolic links that lead out of a release are refused. Reading .pt and .onnx files needs
pip install 'moss-jax[convert]'.
"""

import argparse

from moss_jax.arguments import check_seed
from moss_jax.cli.system_arguments import add_revision_arguments, check_revisions, progress
from moss_jax.errors import MossError

EXPORTS = ("released", "qwen3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="a released language model; with --export, a system")
    parser.add_argument("--codec", metavar="FOLDER", help="the released codec, or a system whose codec to use")
    add_revision_arguments(parser)
    parser.add_argument("--from-qwen3", metavar="FOLDER", help="a Qwen3 of any size")
    parser.add_argument(
        "--split",
        type=int,
        metavar="N",
        help="number of last layers that become the text branch and the audio branch (default: a ninth of the layers)",
    )
    parser.add_argument(
        "--audio-branch",
        default="copy",
        choices=("copy", "random"),
        help="initial weights of the audio branch: a copy of the text branch, or random (default: copy)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    parser.add_argument("--export", choices=EXPORTS, help="write the system --model in another layout")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="a new or empty folder")


def run(args: argparse.Namespace) -> int:
    from moss_jax.convert import system
    from moss_jax.convert.resolve import CODEC_FILES, find_folder

    check_seed(args.seed, "--seed")
    if args.export:
        if args.model is None or args.codec or args.from_qwen3:
            raise MossError("--export: give the system as --model, without --codec and --from-qwen3")
        if args.revision or args.codec_revision:
            raise MossError("--export: takes a system folder, which has no --revision or --codec-revision")
        export = system.export_released if args.export == "released" else system.export_text_path
        export(args.model, args.output, progress)
    elif args.from_qwen3:
        if args.model is not None:
            raise MossError("--from-qwen3: creates the language model; remove --model")
        check_revisions(args)
        qwen3 = find_folder(args.from_qwen3, args.revision)
        codec = find_folder(args.codec, args.codec_revision, CODEC_FILES) if args.codec else None
        system.convert_qwen3(qwen3, args.output, progress, args.split, codec, args.audio_branch, args.seed)
    else:
        if args.model is None or args.codec is None:
            raise MossError("give --model and --codec, or --from-qwen3, or --model and --export; see --help")
        model = find_folder(args.model, args.revision)
        codec = find_folder(args.codec, args.codec_revision, CODEC_FILES)
        system.convert_released(model, codec, args.output, progress)
    print(args.output)
    return 0

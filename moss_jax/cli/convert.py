"""Convert checkpoints into a system folder, and back. Nothing in a checkpoint is run; .pt and .onnx files need the
extra packages of `pip install 'moss-jax[convert]'`.

  moss-jax convert --model MOSS-Speech --codec MOSS-Speech-Codec -o SYSTEM     from the two released folders
  moss-jax convert --from-qwen3 Qwen3-8B -o SYSTEM                             a language model to be trained
  moss-jax convert --from-qwen3 Qwen3-8B --split 4 --codec MOSS-Speech-Codec -o SYSTEM
  moss-jax convert --from-qwen3 Qwen3-8B --codec OTHER_SYSTEM -o SYSTEM        with the codec and voices of a system
  moss-jax convert --model SYSTEM --export released -o FOLDER                  back to the two released folders
  moss-jax convert --model SYSTEM --export qwen3 -o FOLDER                     the text path as a Qwen3

--model, --codec and --from-qwen3 take folders or hub names such as fnlp/MOSS-Speech; --revision and --codec-revision
name a branch, tag or commit there. The codec decides the number of speech codes. A round trip gives every tensor back
bit for bit. What does not fit is listed in full, and nothing is written then. Symbolic links that lead out of a release
are refused.
"""

from moss_jax.arguments import check_seed
from moss_jax.cli.system_arguments import add_revision_arguments, check_revisions, progress
from moss_jax.errors import MossError

EXPORTS = ("released", "qwen3")


def add_arguments(parser):
    parser.add_argument("--model", metavar="FOLDER", help="a released language model; with --export: a system")
    parser.add_argument("--codec", metavar="FOLDER", help="the released codec, or a system whose codec is taken over")
    add_revision_arguments(parser)
    parser.add_argument("--from-qwen3", metavar="FOLDER", help="a plain Qwen3 of any size")
    parser.add_argument(
        "--split",
        type=int,
        metavar="N",
        help="how many of Qwen3's last layers become the text branch and, copied, the audio branch (default: a ninth)",
    )
    parser.add_argument(
        "--audio-branch",
        default="copy",
        choices=("copy", "random"),
        help="what the audio branch starts from: a copy of the text branch (default), or random weights",
    )
    parser.add_argument("--seed", type=int, default=0, help="of new random weights, default 0")
    parser.add_argument("--export", choices=EXPORTS, help="write a system in another layout")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="not there yet, or empty")


def run(args) -> int:
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
            raise MossError("--from-qwen3: starts a language model of its own; leave --model out")
        check_revisions(args)
        qwen3 = find_folder(args.from_qwen3, args.revision)
        codec = args.codec and find_folder(args.codec, args.codec_revision, CODEC_FILES)
        system.convert_qwen3(qwen3, args.output, progress, args.split, codec, args.audio_branch, args.seed)
    else:
        if args.model is None or args.codec is None:
            raise MossError("give --model and --codec, or --from-qwen3, or --model and --export; see --help")
        model = find_folder(args.model, args.revision)
        codec = find_folder(args.codec, args.codec_revision, CODEC_FILES)
        system.convert_released(model, codec, args.output, progress)
    print(args.output)
    return 0

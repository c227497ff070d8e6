"""Compile a function ahead of time for TPUs that are not present, and report whether it fits into their memory.

  moss-jax compile decode --topology v5e:2x4 --batch 8 --context 4096
  moss-jax compile stage1 --topology v5e:16x16 --fsdp 32 --batch 160 --context 14336

Prints JSON: compile time, GiB of arguments, temporaries and outputs per chip, and count and bytes of the collectives of
each kind; for a training step also its FLOPs and its duration at the utilisation --mfu. No TPU and no weights are
needed, only libtpu (pip install 'moss-jax[tpu]'). Compiling the 8b model takes minutes; the elapsed time is written to
standard error every half minute. Exit code 1: it compiles but does not fit.
"""

import argparse
import json
from pathlib import Path

from moss_jax.cli.system_arguments import say
from moss_jax.errors import MossError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from moss_jax.compile.serving import FUNCTIONS, SIZES

    parser.add_argument("function", help="; ".join(f"{name}: {description}" for name, description in FUNCTIONS.items()))
    parser.add_argument("--size", default="8b", help=f"model size: {', '.join(SIZES)} (default: 8b)")
    parser.add_argument(
        "--topology",
        default="v5e:2x4",
        help="generation:chips, such as v5e:2x4, v6e:4x4 or v5p:2x2x1 (default: v5e:2x4)",
    )
    mesh = parser.add_argument_group("mesh", "The remaining devices go to one axis, which depends on the function.")
    mesh.add_argument("--data", type=int, default=1, help="copies of the parameters (default: 1)")
    mesh.add_argument("--fsdp", type=int, default=1, help="shards of parameters and batch (default: 1)")
    mesh.add_argument("--tensor", type=int, default=0, help="shards of heads and MLP (default: the remaining devices)")
    mesh.add_argument(
        "--sequence", type=int, default=0, help="training: shards of a sequence (default: the remaining devices)"
    )
    parser.add_argument("--batch", type=int, default=8, help="conversations or clips (default: 8)")
    parser.add_argument(
        "--context", type=int, default=4096, help="rows of the cache or the sequence; for the codec, codes (default: 4096)"
    )
    parser.add_argument("--accumulate", type=int, default=1, help="training: micro-batches per step (default: 1)")
    parser.add_argument("--remat", default="full", help="training: none, dots or full (default: full)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="training: utilisation for which durations are computed (default: 0.4)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    from moss_jax.checkpoint import write_text
    from moss_jax.compile.serving import CompileRequest, compile_function

    request = CompileRequest(
        args.function,
        args.size,
        args.topology,
        args.data,
        args.fsdp,
        args.tensor,
        args.sequence,
        args.batch,
        args.context,
        args.accumulate,
        args.remat,
        args.mfu,
    )
    request.check()
    if args.output and not args.output.parent.is_dir():
        raise MossError(f"--output {args.output}: the folder {args.output.parent} does not exist")
    result = compile_function(request, say)
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        write_text(args.output, text + "\n")
    return int(result["fits"] is False)  # None: the memory of the chip is unknown

"""Compile a function ahead of time for a TPU topology, without a TPU, and report whether it fits into memory.

  moss-jax compile decode --topology v5e:2x4 --batch 8 --context 4096
  moss-jax compile stage1 --topology v5e:16x16 --fsdp 32 --batch 160 --context 14336

Prints JSON: compile times in seconds, GiB of arguments, temporaries and outputs on each chip, and the collectives by
kind with counts and bytes; for a training step also its FLOP and the step time at --mfu. Weights are shapes only, so no
TPU and little memory is needed, but libtpu is (pip install 'moss-jax[tpu]'). The 8b model takes minutes; progress is
printed on stderr every 30 seconds. Exit code 1: it compiles but does not fit.
"""

import argparse
import json
from pathlib import Path

from moss_jax.cli.system_arguments import say
from moss_jax.errors import MossError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from moss_jax.compile import FUNCTIONS, MODEL_SIZES

    parser.add_argument("function", help="; ".join(f"{name}: {text}" for name, text in FUNCTIONS.items()))
    parser.add_argument("--size", default="8b", help=f"model size: {', '.join(MODEL_SIZES)} (default: 8b)")
    parser.add_argument("--topology", default="v5e:2x4", help="generation:chips, such as v6e:4x4 (default: v5e:2x4)")
    parser.add_argument("--data", type=int, default=1, help="mesh axis: replicas of the parameters (default: 1)")
    parser.add_argument("--fsdp", type=int, default=1, help="mesh axis: shards of parameters and batch (default: 1)")
    parser.add_argument(
        "--tensor", type=int, default=0, help="mesh axis: shards of heads and MLP (default: the remaining devices)"
    )
    parser.add_argument(
        "--sequence",
        type=int,
        default=0,
        help="mesh axis of training: shards of a sequence (default: the remaining devices)",
    )
    parser.add_argument("--batch", type=int, default=8, help="conversations or clips (default: 8)")
    parser.add_argument("--context", type=int, default=4096, help="rows of cache or sequence, or codes (default: 4096)")
    parser.add_argument("--accumulate", type=int, default=1, help="training: micro-batches of a step (default: 1)")
    parser.add_argument("--remat", default="full", help="training: none, dots or full (default: full)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="training: share of the peak FLOP/s for the step time (default: 0.4)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    from moss_jax.compile import CompileRequest, compile_function
    from moss_jax.files import write_text

    request = CompileRequest(
        args.function,
        size=args.size,
        topology=args.topology,
        data=args.data,
        fsdp=args.fsdp,
        tensor=args.tensor,
        sequence=args.sequence,
        batch=args.batch,
        context=args.context,
        accumulate=args.accumulate,
        remat=args.remat,
        mfu=args.mfu,
    )
    request.check()
    if args.output and not args.output.parent.is_dir():
        raise MossError(f"--output {args.output}: the folder {args.output.parent} does not exist")
    result = compile_function(request, say)
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        write_text(args.output, text + "\n")
    return int(result["fits"] is False)  # None: the memory of the chip is not known

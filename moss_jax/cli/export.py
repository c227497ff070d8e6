"""Export a checkpoint of a run as a system folder, for `moss-jax chat --model` and for `moss-jax convert`.

  moss-jax export runs/stage1 -o SYSTEM                                   the newest complete checkpoint
  moss-jax export runs/stage1 --step 2000 --dtype float32 -o SYSTEM
  moss-jax convert --model SYSTEM --export released -o RELEASED           from there to the released layout

Frozen parameters are exported unchanged, bit for bit; LoRA adapters are merged.
"""

import argparse

from moss_jax.cli.system_arguments import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="the folder of a run")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--dtype", help="of the trained parameters: bfloat16 or float32 (default: as configured in the run)"
    )
    parser.add_argument("-o", "--output", required=True, metavar="SYSTEM", help="a folder that does not exist yet")


def run(args: argparse.Namespace) -> int:
    from moss_jax.train.export import export_checkpoint

    export_checkpoint(args.folder, args.output, args.step, args.dtype, say)
    print(args.output)
    return 0

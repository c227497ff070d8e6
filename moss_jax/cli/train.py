"""Train a language model (stages 1 and 2, fine-tuning), the speech tokenizer, or the speech decoder.

  moss-jax train --config configs/miniature/stage1.py                     start, or resume from the last checkpoint
  moss-jax train --config configs/stage1.py --init Qwen3-8B --folder runs/stage1 --set steps=2000
  moss-jax train --config configs/stage1.py --print                       print the resulting config as JSON
  moss-jax train --config configs/stage1.py --distributed                 run this on every host of several
  moss-jax train --config moss_jax/recipes/nano/configs/speech_tokenizer.py    train the speech tokenizer

--set changes any field of the config: steps=100, optimizer.learning_rate=1e-4, mesh.tensor=2, guard.action=stop. On
SIGTERM, Ctrl-C or a preemption notice, the current step is completed and a checkpoint is saved. Exit codes: 0 done, 2
bad input or another process is training in the folder, 3 stopped by the guard because of NaN or loss spikes, 75
preempted. See docs/training_loop.md.
"""

import argparse

from moss_jax.cli.system_arguments import say
from moss_jax.compile_cache import enable_compile_cache
from moss_jax.train.host_memory import keep_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE.py", help="a Python file that defines RUN")
    parser.add_argument(
        "--init",
        metavar="FOLDER",
        help="initial weights: a Qwen3, a released model, a system, or the folder of an earlier run",
    )
    parser.add_argument("--folder", metavar="FOLDER", help="where to write checkpoints, metrics and exports")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a field of the config; may be repeated"
    )
    parser.add_argument("--print", action="store_true", help="print the config as JSON and exit")
    parser.add_argument("--distributed", action="store_true", help="this is one of several processes (jax.distributed)")
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="with --distributed, if JAX cannot detect it: the first process"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="with --coordinator: number of processes")
    parser.add_argument("--process", type=int, metavar="I", help="with --coordinator: index of this process, from 0")


def run(args: argparse.Namespace) -> int:
    from moss_jax.train.run_file import load_run, run_text

    given = [f"{name}={value}" for name in ("init", "folder") if (value := getattr(args, name)) is not None]
    run = load_run(args.config, [*given, *args.set])
    if args.print:
        print(run_text(run), end="")
        return 0
    import jax

    enable_compile_cache()
    if args.distributed:
        from moss_jax.train.processes import join

        join(args.coordinator, args.processes, args.process)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    from moss_jax.train.loop import train

    return train(run, say)

"""Train a language model (stage 1: what is new for speech; stage 2: all of it; fine-tuning) or a part of the codec.

  moss-jax train --config configs/miniature/stage1.py                     begins; the same command again goes on
  moss-jax train --config configs/stage1.py --init Qwen3-8B --folder runs/stage1 --set steps=2000
  moss-jax train --config configs/stage1.py --print                       what it would do, as JSON
  moss-jax train --config configs/stage1.py --distributed                 on every host of several
  moss-jax train --config moss_jax/recipes/nano/configs/speech_tokenizer.py    the speech tokenizer

--set changes any field of the config: steps=100, optimizer.learning_rate=1e-4, mesh.tensor=2, guard.action=stop.
SIGTERM, Ctrl-C or a preemption notice: the step is finished, everything saved, exit code 75. Exit codes: 0 done, 2 bad
input, or another process trains in the folder (one line says what), 3 stopped by the guard over NaN or spikes, 75
preempted. See docs/training_loop.md.
"""

from moss_jax.cli.system_arguments import say
from moss_jax.compile_cache import enable_compile_cache
from moss_jax.train.host_memory import keep_freed_memory


def add_arguments(parser):
    parser.add_argument("--config", required=True, metavar="FILE.py", help="a Python file that sets RUN")
    parser.add_argument(
        "--init",
        metavar="FOLDER",
        help="what to start from: a Qwen3, a released model, a system, or the folder of an earlier run",
    )
    parser.add_argument("--folder", metavar="FOLDER", help="gets checkpoints, metrics and exports")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a field of the run")
    parser.add_argument("--print", action="store_true", help="print the run as JSON and leave")
    parser.add_argument("--distributed", action="store_true", help="one of several processes (jax.distributed)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="with --distributed, where JAX cannot know")
    parser.add_argument("--processes", type=int, metavar="N", help="with --coordinator: how many there are")
    parser.add_argument("--process", type=int, metavar="I", help="with --coordinator: which one this is, from 0")


def run(args) -> int:
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

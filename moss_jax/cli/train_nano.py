"""Train nano, the small bundled system, from scratch: the whole recipe of docs/nano.md.

  moss-jax train-nano                       1.5 hours on two cores; rerun the same command to resume
  moss-jax train-nano --from-step stage2    redo this step and all later ones
  moss-jax train-nano --share 0.1           a tenth of the corpus and of the training steps; learns a little
  moss-jax train-nano --quick               a few examples and training steps, to check that it runs; learns nothing

Writes to ./nano: the system to nano/system, the report to nano/report, and every training to nano/runs. The steps are
corpus, speech_tokenizer, tokenize, flow, vocoder, text, split, stage1, stage2, sft, system and report. On SIGTERM or
Ctrl-C, the current training is saved (exit code 75). Needs pip install 'moss-jax[train,espeak]', and the extra `judge`
for the report.
"""

import argparse
from pathlib import Path
from typing import Any

from moss_jax.cli.system_arguments import say
from moss_jax.compile_cache import enable_compile_cache
from moss_jax.errors import MossError
from moss_jax.train.host_memory import keep_freed_memory

QUICK_ITEMS: dict[str, Any] = {"sets": ("voices",), "ways": ("ss",), "limit": 2}  # of the report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few steps of each training on a few examples")
    parser.add_argument("--from-step", metavar="NAME", help="redo this step and all later ones")
    parser.add_argument("--to-step", metavar="NAME", help="stop after this step")
    parser.add_argument(
        "--share", type=float, default=1.0, help="fraction of the corpus and of the training steps (default: 1)"
    )
    parser.add_argument("--no-report", action="store_true", help="skip the evaluation")
    parser.add_argument("--configs", type=Path, metavar="FOLDER", help="folder of configs (default: the bundled ones)")


def run(args: argparse.Namespace) -> int:
    import importlib.util

    from moss_jax.recipes.nano.train import CONFIGS, Recipe

    keep_freed_memory()  # before the backend starts threads, which would keep their arenas
    enable_compile_cache()
    if not args.no_report and importlib.util.find_spec("pocketsphinx") is None:
        raise MossError("the report needs a judge: pip install 'moss-jax[judge]', or skip it with --no-report")
    report = None if args.no_report else _report
    return Recipe(args.quick, args.share, args.configs or CONFIGS, report, say).run(args.from_step, args.to_step)


def _report(system: Path, folder: Path, quick: bool) -> None:
    from moss_jax.evaluate.model import EvaluatedModel
    from moss_jax.recipes.nano import report

    items = QUICK_ITEMS if quick else {}
    print(report.run(EvaluatedModel(system, batch_size=32), folder, **items, say=say), end="")

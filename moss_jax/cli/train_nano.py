"""Train nano, the small system, from nothing: one command for the whole recipe of docs/nano.md.

  moss-jax train-nano                       an hour and a half on two cores; the same command again goes on
  moss-jax train-nano --from-step stage2    makes this step and those after it anew
  moss-jax train-nano --share 0.1           a tenth of the corpus and of the steps: it begins to learn
  moss-jax train-nano --quick               a few lines and steps of everything, to see that it goes; learns nothing

Everything lands in ./nano: the system in nano/system, the report in nano/report, each training in nano/runs. It needs
pip install 'moss-jax[train,espeak]'; the report needs the extra `judge` too.
Steps: corpus, speech_tokenizer, tokenize, flow, vocoder, text, split, stage1, stage2, sft, system, report. SIGTERM or
Ctrl-C: what is being trained is saved, exit code 75.
"""

from pathlib import Path

from moss_jax.cli.system_arguments import say
from moss_jax.compile_cache import enable_compile_cache
from moss_jax.errors import MossError
from moss_jax.train.host_memory import keep_freed_memory

QUICK_ITEMS = {"sets": ("voices",), "ways": ("ss",), "limit": 2}


def add_arguments(parser):
    parser.add_argument("--quick", action="store_true", help="a few steps of each training, on a few lines")
    parser.add_argument("--from-step", metavar="NAME", help="make this step and those after it anew")
    parser.add_argument("--to-step", metavar="NAME", help="stop after this step")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the corpus and the steps, to see it learn in less time; default 1"
    )
    parser.add_argument("--no-report", action="store_true", help="leave the evaluation out")
    parser.add_argument("--configs", type=Path, metavar="FOLDER", help="folder of configs, instead of the bundled ones")


def run(args) -> int:
    import importlib.util

    from moss_jax.recipes.nano.train import CONFIGS, Recipe

    keep_freed_memory()  # before the backend has threads
    enable_compile_cache()
    if not args.no_report and importlib.util.find_spec("pocketsphinx") is None:
        raise MossError("the report needs a judge: pip install 'moss-jax[judge]', or leave it out with --no-report")
    report = None if args.no_report else _report
    return Recipe(args.quick, args.share, args.configs or CONFIGS, report, say).run(args.from_step, args.to_step)


def _report(system: Path, folder: Path, quick: bool) -> None:
    from moss_jax.evaluate.model import EvaluatedModel
    from moss_jax.recipes.nano import report

    print(report.run(EvaluatedModel(system, batch_size=32), folder, **(QUICK_ITEMS if quick else {}), say=say), end="")

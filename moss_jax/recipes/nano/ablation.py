"""The paper's ablation at nano's scale: the effect of freezing the text model first, and of splitting the layers.

    python -m moss_jax.recipes.nano.ablation                 in the folder in which moss-jax train-nano has finished
    python -m moss_jax.recipes.nano.ablation --seeds 1 --share 0.1 --from-step NF-0

From the same text model, on the same examples and for the same number of updates:

    FP           frozen pre-training: stage 1 (the text model is frozen), then stage 2 (all parameters)
    NF           the same data in the same order, but nothing is ever frozen
    NF-NoSplit   not frozen, and not split: one stack of layers with both heads on top

and then the same SFT. Measured for each run: text kept after stage 1 and after stage 2 (written questions with reserved
phrasings, which the model must continue word for word as the text model does), and right answers after SFT, written and
spoken. All results are in nano/ablation; the same command resumes. Prints the table; nano/ablation/similarity/ compares
the layers of the three.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.compile_cache import enable_compile_cache
from moss_jax.dialogue.grid import text_rows
from moss_jax.errors import MossError
from moss_jax.evaluate.scoring import padded_length
from moss_jax.files import write_text
from moss_jax.progress import Say
from moss_jax.recipes.background import background_process
from moss_jax.recipes.nano.items import read_items
from moss_jax.recipes.nano.train import CONFIGS, FOLDER, make_system, scaled, shortened
from moss_jax.recipes.recipe import RecipeStep, run_recipe
from moss_jax.speech_lm import LayerSplitModel, SpeechLMConfig
from moss_jax.train.host_memory import keep_freed_memory
from moss_jax.train.loop import train
from moss_jax.train.run_file import load_run
from moss_jax.train.run_folder import newest_export
from moss_jax.train.speech_lm.run import Run

ABLATION_FOLDER = FOLDER / "ablation"
ARMS = ("FP", "NF", "NF-NoSplit")
TEXT_COLUMNS = {"stage1": "text kept, stage 1", "stage2": "text kept, stage 2"}
ANSWER_COLUMNS = {"tt": "T->T", "st": "S->T", "ss": "S->S"}
COLUMNS = TEXT_COLUMNS | ANSWER_COLUMNS  # key of a result -> title
TEXT_ITEMS = "phrasings"  # the set whose written questions are continued
ANSWER_ITEMS = "voices"  # the set whose questions are answered
SIMILARITY_SENTENCES = 40
Result = dict[str, tuple[int, int]]  # key of COLUMNS -> (right, total)


def runs_of(arm: str, seed: int, share: float, configs: Path = CONFIGS) -> list[Run]:
    """The training runs of an arm, in order. All arms make the same number of updates on the same data."""
    stage1 = _language_model_run(configs / "stage1.py")
    stage2 = _language_model_run(configs / "stage2.py")
    sft = _language_model_run(configs / "sft.py")
    if arm != "FP":
        stage1 = dataclasses.replace(stage1, stage=stage2.stage)
    if arm.endswith("NoSplit"):
        stage1 = dataclasses.replace(stage1, split=0)
    runs = []
    before = stage1.init
    for name, whole_run in (("stage1", stage1), ("stage2", stage2), ("sft", sft)):
        run = scaled(whole_run, share)
        assert isinstance(run, Run)
        folder = str(ABLATION_FOLDER / f"{arm}-{seed}" / name)
        data = dataclasses.replace(run.data, seed=seed)
        runs.append(
            dataclasses.replace(run, name=f"{arm}-{seed} {name}", folder=folder, init=before, seed=seed, data=data)
        )
        before = folder
    return runs


def _language_model_run(config: Path) -> Run:
    run = load_run(config)
    assert isinstance(run, Run), f"{config} is not a run of the language model"
    return run


def text_kept(folder: Path, limit: int | None = None) -> tuple[int, int]:
    """(right, total): written questions that the model continues with the right answer, by greedy decoding."""
    from moss_jax.evaluate.model import EvaluatedModel

    model = EvaluatedModel(folder, batch_size=32)
    config = model.config
    encode = model.text_tokenizer.encode
    items = read_items(TEXT_ITEMS)[:limit]
    prompts = [len(encode(item.questions[0])) for item in items]
    rows = [text_rows(encode(f"{item.questions[0]} {item.answers[0]}"), config) for item in items]
    size = padded_length(max(map(len, rows)))
    right = 0
    predict = jax.jit(partial(_greedy_ids, config=config))
    for first in range(0, len(rows), model.scorer.batch_size):
        batch = rows[first : first + model.scorer.batch_size]
        predictions = np.asarray(model.scorer.apply(predict, batch, size))
        for grid, predicted, prompt in zip(batch, predictions, prompts[first:], strict=False):
            right += bool((predicted[prompt - 1 : len(grid) - 1] == grid[prompt:, 0]).all())
    return right, len(rows)


def _greedy_ids(params: Any, grid: jax.Array, *, config: SpeechLMConfig) -> jax.Array:
    """The most likely next text id of each row: grid int32 [B, T, 2] -> int32 [B, T]."""
    positions = jnp.broadcast_to(jnp.arange(grid.shape[1]), grid.shape[:2])
    return LayerSplitModel(config).apply({"params": params}, grid, positions)[0].argmax(-1)


def answers(system: Path, folder: Path, limit: int) -> Result:
    """Right answers in each way of ANSWER_COLUMNS; spoken answers are transcribed by the judge."""
    from moss_jax.evaluate.model import EvaluatedModel
    from moss_jax.recipes.nano import report

    report.run(
        EvaluatedModel(system, batch_size=32),
        folder,
        sets=(ANSWER_ITEMS,),
        ways=tuple(ANSWER_COLUMNS),
        limit=limit,
        replies_only=True,
    )
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    result = {}
    for way in ANSWER_COLUMNS:
        right = [r["right"] for r in records if r.get("part") == way and r["group"] == ANSWER_ITEMS]
        result[way] = (sum(right), len(right))
    return result


def table(before: tuple[int, int], results: Mapping[str, Sequence[Result]]) -> str:
    """Percent right, mean and standard deviation over seeds, and whether FP differs from the others by more."""
    percent = {
        arm: {name: [100 * result[name][0] / result[name][1] for result in seeds if name in result] for name in COLUMNS}
        for arm, seeds in results.items()
    }
    lines = [
        f"| training | seeds | {' | '.join(f'{title} %' for title in COLUMNS.values())} |",
        "|---|---:|" + "---:|" * len(COLUMNS),
    ]
    lines.append(f"| the text model, before | - | {100 * before[0] / before[1]:.1f} |{' - |' * (len(COLUMNS) - 1)}")
    for arm, columns in percent.items():
        cells = [_mean_and_deviation(values) for values in columns.values()]
        lines.append(f"| {arm} | {len(results[arm])} | {' | '.join(cells)} |")
    lines.append("")
    for other in (arm for arm in percent if arm != "FP" and "FP" in percent):
        for name, title in COLUMNS.items():
            fp_values = percent["FP"][name]
            other_values = percent[other][name]
            if len(fp_values) > 1 and len(other_values) > 1:
                difference = np.mean(fp_values) - np.mean(other_values)
                spread = max(np.std(fp_values, ddof=1), np.std(other_values, ddof=1))
                where = "within" if abs(difference) <= spread else "beyond"
                comparison = f"{where} the larger spread over seeds ({spread:.1f})"
                lines.append(f"FP - {other}, {title}: {difference:+.1f} points, {comparison}")
    return "\n".join(lines) + "\n"


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One run of an arm, trained and evaluated; `args` are the arguments of `main`."""

    name: str
    seed: int
    args: argparse.Namespace

    def run(self, say: Say) -> int:
        args = self.args
        folder = ABLATION_FOLDER / f"{self.name}-{self.seed}"
        runs = runs_of(self.name, self.seed, args.share)
        for run in runs:
            jax.clear_caches()
            if exit_code := train(shortened(run) if args.quick else run, say):
                return exit_code
        result = {stage: text_kept(newest_export(folder / stage), args.items) for stage in TEXT_COLUMNS}
        if not args.no_answers:
            if not (folder / "system").is_dir():
                decoder = newest_export(FOLDER / "runs" / "vocoder")
                make_system(folder / "system", language_model=newest_export(runs[-1].folder), speech_decoder=decoder)
            result |= answers(folder / "system", folder / "report", args.items)
        write_text(folder / "result.json", json.dumps(result) + "\n")
        return 0

    def step(self, in_background: bool) -> RecipeStep:
        name = f"{self.name}-{self.seed}"
        start = background_process(self.run, name) if in_background else None
        return RecipeStep(name, "stage 1, stage 2, SFT", partial(self.run, say), (ABLATION_FOLDER / name,), start)


def steps_of(args: argparse.Namespace) -> list[RecipeStep]:
    """The steps. On a CPU with several cores every second run is trained in the background, beside the others."""

    def before() -> int:
        ABLATION_FOLDER.mkdir(parents=True, exist_ok=True)
        write_text(
            ABLATION_FOLDER / "before.json", json.dumps(text_kept(newest_export(FOLDER / "runs" / "text"), args.items))
        )
        return 0

    arms = [Arm(arm, seed, args) for seed in range(args.seeds) for arm in ARMS]
    return [
        RecipeStep("before", "evaluate the text model", before, (ABLATION_FOLDER / "before.json",)),
        *(arm.step(in_background=True) for arm in arms[1::2]),
        *(arm.step(in_background=False) for arm in arms[::2]),
        RecipeStep(
            "similarity",
            "compare speech and text, layer by layer",
            _similarity,
            (ABLATION_FOLDER / "similarity",),
            needs_background=True,
        ),
    ]


def _similarity() -> int:
    from moss_jax.evaluate import similarity
    from moss_jax.evaluate.model import EvaluatedModel

    if not (ABLATION_FOLDER / "similarity").is_dir():
        lines = (FOLDER / "coded" / "asr.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(ABLATION_FOLDER / "sentences.jsonl", "".join(lines[:SIMILARITY_SENTENCES]))
        models = {arm: EvaluatedModel(newest_export(ABLATION_FOLDER / f"{arm}-0" / "stage2")) for arm in ARMS}
        (name, model), *others = models.items()
        similarity.run(
            model, ABLATION_FOLDER / "sentences.jsonl", ABLATION_FOLDER / "similarity", controls=others, name=name
        )
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default 3)")
    parser.add_argument("--share", type=float, default=1 / 3, help="share of the recipe's training steps (default 1/3)")
    parser.add_argument("--items", type=int, default=200, help="items per measurement (default 200)")
    parser.add_argument("--no-answers", action="store_true", help="measure the text kept only; needs no judge")
    parser.add_argument("--quick", action="store_true", help="a few training steps each, to test everything")
    parser.add_argument("--from-step", metavar="NAME", help="run this step and those after it anew")
    args = parser.parse_args(argv)
    arguments = {name: getattr(args, name) for name in ("seeds", "share", "items", "no_answers", "quick")}
    keep_freed_memory()  # as moss-jax train-nano does
    enable_compile_cache()  # all runs have the same few programs
    try:
        if exit_code := run_recipe(ABLATION_FOLDER, steps_of(args), arguments, args.from_step, say=say):
            return exit_code
        results = {
            arm: [
                json.loads((ABLATION_FOLDER / f"{arm}-{seed}" / "result.json").read_text())
                for seed in range(args.seeds)
            ]
            for arm in ARMS
        }
        text = table(json.loads((ABLATION_FOLDER / "before.json").read_text()), results)
        write_text(ABLATION_FOLDER / "table.md", text)
        print(text, end="")
    except MossError as error:
        say(f"ablation: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

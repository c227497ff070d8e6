"""The paper's ablation in small: what freezing the text model first, and splitting the layers, are good for.

    python -m moss_jax.recipes.nano.ablation                 in the folder in which moss-jax train-nano has finished
    python -m moss_jax.recipes.nano.ablation --seeds 1 --share 0.1 --from-step NF-0

From the same text model, on the same examples and for as many updates:

    FP           frozen pre-training: stage 1 (the text model frozen), then stage 2 (everything trains)
    NF           the same data in the same order, but nothing is ever frozen
    NF-NoSplit   nor is there a split: one stack of layers, both heads on top of it

and then the same SFT each. Of every run: text kept after stage 1 and after stage 2 (questions in writing, reserved
phrasings, continued word for word, as the text model was taught them), and answers right after SFT, written and
spoken. Everything lands in nano/ablation; the same command goes on where it was. Prints the table;
nano/ablation/similarity/ has the layers of the three side by side.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.checkpoint import write_text
from moss_jax.cli.system_arguments import keep_compiled
from moss_jax.dialogue.grid import text_rows
from moss_jax.errors import MossError
from moss_jax.evaluate.scoring import padded_length
from moss_jax.recipes.background import beside
from moss_jax.recipes.nano.items import read_items
from moss_jax.recipes.nano.train import CONFIGS, FOLDER, make_system, scaled, shortened
from moss_jax.recipes.recipe import RecipeStep, run_recipe
from moss_jax.speech_lm import LayerSplitModel
from moss_jax.train.host_memory import keep_freed_memory
from moss_jax.train.loop import train
from moss_jax.train.run import Run, load_run
from moss_jax.train.run_folder import newest_export

PLACE = FOLDER / "ablation"
ARMS = ("FP", "NF", "NF-NoSplit")
TEXT = {"stage1": "text kept, stage 1", "stage2": "text kept, stage 2"}
WAYS = {"tt": "T->T", "st": "S->T", "ss": "S->S"}
COLUMNS = TEXT | WAYS
TEXT_SETS = ("phrasings",)  # items whose questions are continued in writing
SENTENCES = 40  # of the similarity
Result = dict[str, tuple[int, int]]  # column -> (right, of)


def runs_of(arm: str, seed: int, share: float, configs: Path = CONFIGS) -> list[Run]:
    """The trainings of an arm, one after the other; all arms make as many updates, on the same data."""
    stage1, stage2, sft = (load_run(configs / f"{name}.py") for name in ("stage1", "stage2", "sft"))
    if arm != "FP":
        stage1 = dataclasses.replace(stage1, stage=stage2.stage)
    if arm.endswith("NoSplit"):
        stage1 = dataclasses.replace(stage1, split=0)
    runs = []
    before = stage1.init
    for name, run in (("stage1", stage1), ("stage2", stage2), ("sft", sft)):
        run = scaled(run, share)
        folder = str(PLACE / f"{arm}-{seed}" / name)
        data = dataclasses.replace(run.data, seed=seed)
        runs.append(
            dataclasses.replace(run, name=f"{arm}-{seed} {name}", folder=folder, init=before, seed=seed, data=data)
        )
        before = folder
    return runs


def text_kept(folder: Path, limit: int | None = None) -> tuple[int, int]:
    """(right, of): questions in writing whose answers the model continues with, each word the likeliest."""
    from moss_jax.evaluate.model import EvaluatedModel

    model = EvaluatedModel(folder, batch_size=32)
    config = model.config
    encode = model.text_tokenizer.encode
    items = [item for name in TEXT_SETS for item in read_items(name)][:limit]
    prompts = [len(encode(item.questions[0])) for item in items]
    rows = [text_rows(encode(f"{item.questions[0]} {item.answers[0]}"), config) for item in items]
    size = padded_length(max(map(len, rows)))
    right = 0
    guess = jax.jit(partial(_likeliest, config=config))
    for first in range(0, len(rows), model.scorer.batch_size):
        part = rows[first : first + model.scorer.batch_size]
        guesses = np.asarray(model.scorer.apply(guess, part, size))
        for own, told, prompt in zip(part, guesses, prompts[first:], strict=False):
            right += bool((told[prompt - 1 : len(own) - 1] == own[prompt:, 0]).all())
    return right, len(rows)


def _likeliest(params, grid, *, config):
    positions = jnp.broadcast_to(jnp.arange(grid.shape[1]), grid.shape[:2])
    return LayerSplitModel(config).apply({"params": params}, grid, positions)[0].argmax(-1)


def answers(system: Path, folder: Path, limit: int) -> Result:
    """Answers right, three ways: written and spoken questions, spoken answers as the judge hears them."""
    from moss_jax.evaluate.model import EvaluatedModel
    from moss_jax.recipes.nano import report

    report.run(
        EvaluatedModel(system, batch_size=32),
        folder,
        sets=("voices",),
        ways=tuple(WAYS),
        limit=limit,
        replies_only=True,
    )
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {way: [r["right"] for r in records if r.get("part") == way and r["group"] == "voices"] for way in WAYS}
    return {way: (sum(right), len(right)) for way, right in found.items()}


def table(before: tuple[int, int], results: Mapping[str, Sequence[Result]]) -> str:
    """Percent right, mean and standard deviation over seeds, and whether FP is ahead of each beyond both spreads."""
    percent = {
        arm: {name: [100 * one[name][0] / one[name][1] for one in seeds if one.get(name)] for name in COLUMNS}
        for arm, seeds in results.items()
    }
    lines = [
        f"| training | seeds | {' | '.join(f'{told} %' for told in COLUMNS.values())} |",
        "|---|---:|" + "---:|" * len(COLUMNS),
    ]
    lines.append(f"| the text model, before | - | {100 * before[0] / before[1]:.1f} |{' - |' * (len(COLUMNS) - 1)}")
    for arm, columns in percent.items():
        cells = [_spread(values) for values in columns.values()]
        lines.append(f"| {arm} | {len(results[arm])} | {' | '.join(cells)} |")
    lines.append("")
    for other in (arm for arm in percent if arm != "FP" and "FP" in percent):
        for name, told in COLUMNS.items():
            mine = percent["FP"][name]
            theirs = percent[other][name]
            if len(mine) > 1 and len(theirs) > 1:
                difference = np.mean(mine) - np.mean(theirs)
                spread = max(np.std(mine, ddof=1), np.std(theirs, ddof=1))
                where = "within" if abs(difference) <= spread else "beyond"
                told_spread = f"{where} the larger spread over seeds ({spread:.1f})"
                lines.append(f"FP - {other}, {told}: {difference:+.1f} points, {told_spread}")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One run of an arm, trained and measured; `args` as `main` reads them."""

    name: str
    seed: int
    args: argparse.Namespace

    def make(self, say: Callable[[str], None]) -> int:
        args = self.args
        place = PLACE / f"{self.name}-{self.seed}"
        runs = runs_of(self.name, self.seed, args.share)
        for run in map(shortened, runs) if args.quick else runs:
            jax.clear_caches()
            if code := train(run, say):
                return code
        result = {stage: text_kept(newest_export(place / stage), args.items) for stage in TEXT}
        if not args.no_answers:
            if not (place / "system").is_dir():
                decoder = newest_export(FOLDER / "runs" / "vocoder")
                make_system(place / "system", language_model=newest_export(runs[-1].folder), speech_decoder=decoder)
            result |= answers(place / "system", place / "report", args.items)
        write_text(place / "result.json", json.dumps(result) + "\n")
        return 0

    def step(self, aside: bool) -> RecipeStep:
        name = f"{self.name}-{self.seed}"
        start = beside(self.make, name) if aside else None
        return RecipeStep(name, "stage 1, stage 2, SFT", partial(self.make, say), (PLACE / name,), start)


def steps_of(args: argparse.Namespace) -> list[RecipeStep]:
    """On a CPU with several cores two runs at a time: the second, fourth, ... are made beside the others."""

    def before() -> int:
        PLACE.mkdir(parents=True, exist_ok=True)
        write_text(PLACE / "before.json", json.dumps(text_kept(newest_export(FOLDER / "runs" / "text"), args.items)))
        return 0

    arms = [Arm(arm, seed, args) for seed in range(args.seeds) for arm in ARMS]
    return [
        RecipeStep("before", "the text model's own answers", before, (PLACE / "before.json",)),
        *(arm.step(aside=True) for arm in arms[1::2]),
        *(arm.step(aside=False) for arm in arms[::2]),
        RecipeStep("similarity", "speech and text, layer by layer", _similarity, (PLACE / "similarity",), gathers=True),
    ]


def _similarity() -> int:
    from moss_jax.evaluate import similarity
    from moss_jax.evaluate.model import EvaluatedModel

    if not (PLACE / "similarity").is_dir():
        lines = (FOLDER / "coded" / "asr.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(PLACE / "sentences.jsonl", "".join(lines[:SENTENCES]))
        models = {arm: EvaluatedModel(newest_export(PLACE / f"{arm}-0" / "stage2")) for arm in ARMS}
        (name, own), *others = models.items()
        similarity.run(own, PLACE / "sentences.jsonl", PLACE / "similarity", controls=others, name=name)
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the recipe's updates (default a third)")
    parser.add_argument("--items", type=int, default=200, help="of each measure (default 200)")
    parser.add_argument("--no-answers", action="store_true", help="without the judge: text kept only")
    parser.add_argument("--quick", action="store_true", help="a few updates each, to see that it goes")
    parser.add_argument("--from-step", metavar="NAME", help="make this step and those after it anew")
    args = parser.parse_args(argv)
    about = {name: getattr(args, name) for name in ("seeds", "share", "items", "no_answers", "quick")}
    keep_freed_memory()  # as moss-jax train-nano does
    keep_compiled()  # nine runs of a few programs
    try:
        if code := run_recipe(PLACE, steps_of(args), about, args.from_step, say=say):
            return code
        results = {
            arm: [json.loads((PLACE / f"{arm}-{seed}" / "result.json").read_text()) for seed in range(args.seeds)]
            for arm in ARMS
        }
        told = table(json.loads((PLACE / "before.json").read_text()), results)
        write_text(PLACE / "table.md", told)
        print(told, end="")
    except MossError as error:
        say(f"ablation: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The nano recipe: from nothing to a small MOSS-Speech that answers aloud. docs/nano.md tells it.

    nano/corpus/           speech and text, made with espeak-ng
         base/             a system without weights of a language model: text tokenizer, speech tokenizer, sizes
         coded/, data/     the corpus as codes; examples to train on
         qwen3/            the text model as a plain Qwen3, which the layer split starts from
         runs/PART/        every training, with metrics, checkpoints and exports
         system/           the whole, for `moss_jax.load`
         report/           what `moss-jax eval nano` found
         recipe.json       steps that are done, and the time they took

The trainings are the configs in moss_jax/recipes/nano/configs/, whose paths begin at the working directory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax

from moss_jax.checkpoint import atomic_folder, write_text
from moss_jax.checkpoint.config_io import write_config
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SYSTEM_FORMAT, SystemFolder
from moss_jax.convert.files import copy_file, write_json
from moss_jax.convert.qwen3 import export_qwen3
from moss_jax.documents import read_lines
from moss_jax.errors import MossError
from moss_jax.recipes.background import beside
from moss_jax.recipes.recipe import RecipeStep, Say, run_recipe
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.speech_lm.config import NANO, SpeechLMConfig
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER
from moss_jax.text.tokenizer import TextTokenizer
from moss_jax.train.loop import train
from moss_jax.train.run import BaseRun, load_run, override
from moss_jax.train.run_folder import newest_export
from moss_jax.train.speech_tokenizer.run import SpeechTokenizerRun

FOLDER = Path("nano")  # in the working directory, as the configs have it
CONFIGS = Path(__file__).with_name("configs")
MOST_BYTES = 20 * 10**6  # of the system's weights
SPOKEN = ("asr", "tts", "interleaved", "chat", "chat-valid")  # manifests whose recordings become codes
WRITTEN = ("text", "text-valid")
DECODER = {"voice": "decoder", "voice-valid": "decoder-valid"}  # data set of the speech decoder -> manifest
VARIANTS = 3  # examples of an interleaved document, each cut at other places
QUICK_SCALE = 0.005
QUICK_LINES = 12
QUICK_STEPS = 4
QUICK_BATCH = 4
SAMPLING = {"greedy": True, "repetition_penalty": 1.0, "max_new_tokens": 64}  # the penalty is for 16,384 codes
Report = Callable[[Path, Path, bool], None]


@dataclass(frozen=True)
class Recipe:
    """What is asked for.

    Attributes:
        quick: a few lines of data, a few steps of each training: everything is gone through, nothing is learned.
        share: of the corpus and of every training's steps; less than 1 to see it learn in a short time.
        configs: the folder of the runs.
        report: (system, folder, quick) -> measures the system into a folder; None leaves the last step out.
        say: gets lines for people.
    """

    quick: bool = False
    share: float = 1.0
    configs: Path = CONFIGS
    report: Report | None = None
    say: Say = print

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise MossError(f"share is {self.share}, expected a number above 0 and at most 1")

    def make(self, from_step: str | None = None, to_step: str | None = None) -> int:
        """Goes on where it was, to the end or to that of `to_step`; returns 0, 3 (stopped by the guard) or 75 (called
        to stop, saved).

        Raises:
            MossError: something is missing or does not fit; what was made stays.
        """
        if not self.configs.is_dir():
            raise MossError(f"{self.configs}: no such folder, expected the configs of nano; run in a clone of moss_jax")
        about = {"quick": self.quick} | ({"share": self.share} if self.share != 1 else {})
        return run_recipe(FOLDER, self.steps(), about, from_step, to_step, self.say)

    def steps(self) -> tuple[RecipeStep, ...]:
        steps = [
            RecipeStep("corpus", "speech and text with espeak-ng", self._corpus, (FOLDER / "corpus",)),
            self._training("speech_tokenizer", "speech -> codes"),
            RecipeStep(
                "tokenize",
                "the corpus as codes and examples",
                self._tokenize,
                (FOLDER / "base", FOLDER / "coded", FOLDER / "data"),
            ),
            self._training("flow", "codes -> mel", self._beside("flow")),
            self._training("vocoder", "mel -> sound", self._beside("vocoder")),
            self._training("text", "a small Qwen3 learns the domain in writing"),
            RecipeStep("split", "the text model as a Qwen3, to be split", self._split, (FOLDER / "qwen3",)),
            self._training("stage1", "what is new for speech learns, the text model is frozen"),
            self._training("stage2", "everything learns"),
            self._training("sft", "conversations"),
            RecipeStep("system", "all parts in one folder", self._system, (FOLDER / "system",), gathers=True),
        ]
        if self.report is not None:
            steps.append(RecipeStep("report", "frozen items and the judge", self._report, (FOLDER / "report",)))
        return tuple(steps)

    def run_of(self, name: str) -> BaseRun:
        """The run of a config, short where the recipe is."""
        run = load_run(self.configs / f"{name}.py")
        return shortened(run) if self.quick else scaled(run, self.share)

    def _training(self, name: str, what: str, start: Callable[[], BaseProcess] | None = None) -> RecipeStep:
        def work() -> int:
            jax.clear_caches()  # what other trainings compiled
            return train(self.run_of(name), self.say)

        return RecipeStep(name, f"{what} (configs/{name}.py)", work, (FOLDER / "runs" / name,), start)

    def _beside(self, name: str) -> Callable[[], BaseProcess] | None:
        """The speech decoder and the language model need nothing of each other."""
        return beside(partial(_train, replace(self, report=None, say=print), name), name)

    def _corpus(self) -> int:
        from moss_jax.recipes.nano.corpus import make_nano_corpus

        corpus = FOLDER / "corpus"
        if not corpus.is_dir():  # else it was whole when the recipe was stopped
            tell = _now_and_then(self.say)
            make_nano_corpus(
                corpus,
                QUICK_SCALE if self.quick else self.share,
                progress=lambda done, total: tell(f"{done} of {total} utterances", done == total),
            )
        if self.quick:
            for path in sorted(corpus.glob("*.jsonl")):
                lines = [line.content.decode("utf-8") for line in islice(read_lines(path), QUICK_LINES)]
                write_text(path, "".join(f"{line}\n" for line in lines))
        return 0

    def _tokenize(self) -> int:
        from moss_jax.data.coded import encode_manifests
        from moss_jax.data.spoken import SpokenRequest, make_spoken
        from moss_jax.data.tokenize import Request, tokenize

        base, corpus, coded, data = (FOLDER / name for name in ("base", "corpus", "coded", "data"))
        if not base.is_dir():
            make_base(base, corpus / "text_tokenizer.json", newest_export(FOLDER / "runs" / "speech_tokenizer"))
        tell = _now_and_then(self.say)
        encode_manifests([corpus / f"{name}.jsonl" for name in SPOKEN], base, coded, tell)
        for name in (*SPOKEN, *WRITTEN):
            form = name.partition("-")[0]
            if not (data / name).is_dir():
                manifest = (coded if name in SPOKEN else corpus) / f"{name}.jsonl"
                variants = VARIANTS if form == "interleaved" else 1
                tokenize(Request(manifest, base, form, data / name, variants=variants), tell)
                self.say(f"{data / name}: {form}")
        for name, manifest in DECODER.items():
            if not (data / name).is_dir():
                make_spoken(SpokenRequest(corpus / f"{manifest}.jsonl", base, data / name), tell)
                self.say(f"{data / name}: decoder")
        return 0

    def _split(self) -> int:
        target = FOLDER / "qwen3"
        if not target.is_dir():
            with atomic_folder(target) as folder:
                export_qwen3(newest_export(FOLDER / "runs" / "text"), folder)
        return 0

    def _system(self) -> int:
        target = FOLDER / "system"
        runs = FOLDER / "runs"
        if not target.is_dir():
            make_system(
                target, language_model=newest_export(runs / "sft"), speech_decoder=newest_export(runs / "vocoder")
            )
        weights = sum(path.stat().st_size for path in target.rglob("*.safetensors"))
        if weights > MOST_BYTES:
            raise MossError(f"{target}: {weights / 1e6:.1f} MB of weights, expected at most {MOST_BYTES / 1e6:.0f}")
        self.say(f"{target}: {weights / 1e6:.1f} MB of weights; moss-jax chat --model {target} --text 'Hello.'")
        return 0

    def _report(self) -> int:
        self.report(FOLDER / "system", FOLDER / "report", self.quick)
        return 0


def _train(recipe: Recipe, name: str, say: Say) -> int:
    return train(recipe.run_of(name), say)


def shortened(run: BaseRun) -> BaseRun:
    """The run with a few steps on small batches, to see that it goes."""
    if isinstance(run, SpeechTokenizerRun):  # a step is compiled for each bucket
        run = replace(run, buckets=run.buckets[-1:])
    return override(
        run,
        [
            f"steps={QUICK_STEPS}",
            "optimizer.warmup_steps=1",
            f"save_every={QUICK_STEPS}",
            "evaluate_every=0",
            "evaluate_batches=1",
            "export_every=0",
            "log_every=1",
            f"batch_size={min(run.batch_size, QUICK_BATCH)}",
        ],
    )


def scaled(run: BaseRun, share: float) -> BaseRun:
    """The run with a share of its steps, on the same schedule."""
    if share == 1:
        return run
    steps = max(round(run.steps * share), 1)
    names = ("save_every", "evaluate_every", "export_every", "log_every")
    every = [f"{name}={-(-getattr(run, name) * steps // run.steps)}" for name in names]
    warmup = run.optimizer.warmup_steps * steps // run.steps
    return override(
        run, [f"steps={steps}", f"optimizer.total_steps={steps}", f"optimizer.warmup_steps={warmup}", *every]
    )


def make_base(folder: Path, text_tokenizer: Path, speech_tokenizer: Path, config: SpeechLMConfig = NANO) -> None:
    """Writes a system with tokenizers and the language model's sizes, enough to make examples with.

    Args:
        text_tokenizer: a tokenizer.json with the config's special ids.
        speech_tokenizer: a folder with `speech_tokenizer/` in it.
    """
    with atomic_folder(folder) as part:
        write_json(part / SYSTEM_FILE, {"format": SYSTEM_FORMAT, "default_voice": None})
        write_json(part / "transformer" / "config.json", write_config(config))
        copy_file(text_tokenizer, part / "text_tokenizer" / "tokenizer.json")
        _copy_room("speech_tokenizer", speech_tokenizer, part)
        base = SystemFolder(part)
        TextTokenizer.from_file(base.text_tokenizer_path, config)
        codes = base.config(SPEECH_TOKENIZER).quantize_vocab_size
        if codes != config.eosp_id:
            raise MossError(f"{speech_tokenizer}: has {codes} codes, expected {config.eosp_id}, the model's eosp_id")
        (part / "voices").mkdir()


def make_system(folder: Path, *, language_model: Path, speech_decoder: Path) -> None:
    """Writes a system, whole or not at all: the speech decoder of one folder, everything else of another. It has no
    recorded voice: the decoder knows one."""
    with atomic_folder(folder) as part:
        write_json(part / SYSTEM_FILE, {"format": SYSTEM_FORMAT, "default_voice": None, "sampling": SAMPLING})
        for room in ("transformer", "speech_tokenizer", "text_tokenizer"):
            _copy_room(room, language_model, part)
        _copy_room("speech_decoder", speech_decoder, part)
        (part / "voices").mkdir()
        system = SystemFolder(part)
        config = system.config(SPEECH_LM)
        TextTokenizer.from_file(system.text_tokenizer_path, config)
        decoder = system.config(SPEECH_DECODER)
        codes = decoder.flow.codebook_size
        if codes != config.eosp_id:
            raise MossError(f"{speech_decoder}: its flow knows {codes} codes, the language model {config.eosp_id}")


def _copy_room(room: str, source: Path, target: Path) -> None:
    paths = [path for path in sorted((source / room).rglob("*")) if path.is_file()]
    if not paths:
        raise MossError(f"{source}: has no {room}, expected it there")
    for path in paths:
        copy_file(path, target / path.relative_to(source))


def _now_and_then(say: Say, seconds: float = 20.0) -> Callable[..., None]:
    """Of many lines one in a while, and those that are forced."""
    last = time.monotonic()

    def tell(line: str, force: bool = False) -> None:
        nonlocal last
        if force or time.monotonic() - last >= seconds:
            say(line)
            last = time.monotonic()

    return tell

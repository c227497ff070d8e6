"""The nano recipe: trains a small spoken dialogue system from scratch. docs/nano.md is the guide.

    nano/corpus/           speech and text, synthesised with espeak-ng
         base/             a system without language model weights: text tokenizer, speech tokenizer, model config
         coded/, data/     the corpus as codes; data sets of training examples
         qwen3/            the text model as a plain Qwen3, the start of the layer split
         runs/NAME/        every training run, with metrics, checkpoints and exports
         system/           the finished system, for `moss_jax.load`
         report/           the report of `moss-jax eval nano`
         recipe.json       the steps that are done, and the time they took

The training runs are the configs in the folder configs/ of this package. Their paths are relative to the working
directory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import jax

from moss_jax.checkpoint.config_io import write_config
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SYSTEM_FORMAT, SystemFolder
from moss_jax.convert.files import copy_file, write_json
from moss_jax.convert.qwen3 import export_qwen3
from moss_jax.documents import read_lines
from moss_jax.errors import MossError
from moss_jax.files import atomic_folder, write_text
from moss_jax.progress import Progress, Say
from moss_jax.recipes.background import StartProcess, background_process
from moss_jax.recipes.nano.sizes import LANGUAGE_MODEL
from moss_jax.recipes.recipe import RecipeStep, run_recipe
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.speech_lm.config import SpeechLMConfig
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER
from moss_jax.text.tokenizer import TextTokenizer
from moss_jax.train.loop import train
from moss_jax.train.run import BaseRun
from moss_jax.train.run_file import load_run, override
from moss_jax.train.run_folder import newest_export
from moss_jax.train.speech_tokenizer.run import SpeechTokenizerRun

FOLDER = Path("nano")  # in the working directory; the configs have the same
CONFIGS = Path(__file__).with_name("configs")
MAX_SYSTEM_BYTES = 20 * 10**6  # of weights, so that the system can be part of the package
SPOKEN_MANIFESTS = ("asr", "tts", "interleaved", "chat", "chat-valid")  # whose recordings are encoded
WRITTEN_MANIFESTS = ("text", "text-valid")
DECODER_DATA = {"voice": "decoder", "voice-valid": "decoder-valid"}  # data set -> manifest
INTERLEAVED_VARIANTS = 3  # examples per interleaved document, with different cuts
# With --quick: scale of the corpus, lines of each manifest, steps and batch size of each training run.
QUICK_SCALE = 0.005
QUICK_LINES = 12
QUICK_STEPS = 4
QUICK_BATCH = 4
# Default settings of the system. The released repetition penalty suits 16,384 codes, not 256.
SAMPLING = {"greedy": True, "repetition_penalty": 1.0, "max_new_tokens": 64}
Report = Callable[[Path, Path, bool], None]


@dataclass(frozen=True)
class Recipe:
    """The recipe with its options.

    Attributes:
        quick: a few lines of data and a few steps of each training run, to test all steps; nothing is learned.
        share: of the corpus and of the steps of every training run; less than 1 for a shorter training.
        configs: the folder with the configs of the training runs.
        report: (system, folder, quick) -> evaluates the system into a folder. None: there is no step "report".
        say: receives progress.
    """

    quick: bool = False
    share: float = 1.0
    configs: Path = CONFIGS
    report: Report | None = None
    say: Say = print

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise MossError(f"share is {self.share}, expected a number > 0 and <= 1")

    def run(self, from_step: str | None = None, to_step: str | None = None) -> int:
        """Runs the steps that are not done, see `run_recipe`.

        Returns:
            0, 3 (a training run was stopped by its guard) or 75 (preempted, saved).

        Raises:
            MossError: something is missing or does not fit. The outputs of finished steps are kept.
        """
        if not self.configs.is_dir():
            raise MossError(f"{self.configs}: no such folder, expected the configs of nano")
        arguments: dict[str, bool | float] = {"quick": self.quick}
        if self.share != 1:
            arguments["share"] = self.share
        return run_recipe(FOLDER, self.steps(), arguments, from_step, to_step, self.say)

    def steps(self) -> tuple[RecipeStep, ...]:
        steps = [
            RecipeStep("corpus", "synthesise speech and text with espeak-ng", self._corpus, (FOLDER / "corpus",)),
            self._training("speech_tokenizer", "speech -> codes"),
            RecipeStep(
                "tokenize",
                "encode the corpus and make training examples",
                self._tokenize,
                (FOLDER / "base", FOLDER / "coded", FOLDER / "data"),
            ),
            self._training("flow", "codes -> mel", self._in_background("flow")),
            self._training("vocoder", "mel -> waveform", self._in_background("vocoder")),
            self._training("text", "a small Qwen3 on written text"),
            RecipeStep(
                "split", "export the text model as a Qwen3, for the layer split", self._split, (FOLDER / "qwen3",)
            ),
            self._training("stage1", "the new speech parameters, with the text model frozen"),
            self._training("stage2", "all parameters"),
            self._training("sft", "conversations"),
            RecipeStep(
                "system", "all components in one folder", self._system, (FOLDER / "system",), needs_background=True
            ),
        ]
        if self.report is not None:
            steps.append(
                RecipeStep("report", "evaluate the system on the test items", self._report, (FOLDER / "report",))
            )
        return tuple(steps)

    def run_config(self, name: str) -> BaseRun:
        """The training run of a config, shortened as `quick` and `share` say."""
        run = load_run(self.configs / f"{name}.py")
        return shortened(run) if self.quick else scaled(run, self.share)

    def _training(self, name: str, description: str, start: StartProcess | None = None) -> RecipeStep:
        def work() -> int:
            jax.clear_caches()  # programs that other runs compiled
            return train(self.run_config(name), self.say)

        return RecipeStep(name, f"train {description} (configs/{name}.py)", work, (FOLDER / "runs" / name,), start)

    def _in_background(self, name: str) -> StartProcess | None:
        """The training of the speech decoder and that of the language model do not depend on each other."""
        return background_process(partial(_train, replace(self, report=None, say=print), name), name)

    def _corpus(self) -> int:
        from moss_jax.recipes.nano.corpus import make_nano_corpus

        corpus = FOLDER / "corpus"
        if not corpus.is_dir():  # otherwise it was finished when the recipe was interrupted
            progress = Progress(self.say)
            make_nano_corpus(
                corpus,
                QUICK_SCALE if self.quick else self.share,
                progress=lambda done, total: progress(f"{done} of {total} utterances", force=done == total),
            )
        if self.quick:
            for path in sorted(corpus.glob("*.jsonl")):
                lines = [line.content.decode("utf-8") for line in islice(read_lines(path), QUICK_LINES)]
                write_text(path, "".join(f"{line}\n" for line in lines))
        return 0

    def _tokenize(self) -> int:
        from moss_jax.data.coded import encode_manifests
        from moss_jax.data.decoder_data import DecoderDataRequest, build_decoder_data
        from moss_jax.data.tokenize import TokenizeRequest, tokenize

        base = FOLDER / "base"
        corpus = FOLDER / "corpus"
        coded = FOLDER / "coded"
        data = FOLDER / "data"
        if not base.is_dir():
            make_base(base, corpus / "text_tokenizer.json", newest_export(FOLDER / "runs" / "speech_tokenizer"))
        progress = Progress(self.say)
        encode_manifests([corpus / f"{name}.jsonl" for name in SPOKEN_MANIFESTS], base, coded, progress)
        for name in (*SPOKEN_MANIFESTS, *WRITTEN_MANIFESTS):
            format = name.partition("-")[0]
            if not (data / name).is_dir():
                manifest = (coded if name in SPOKEN_MANIFESTS else corpus) / f"{name}.jsonl"
                variants = INTERLEAVED_VARIANTS if format == "interleaved" else 1
                tokenize(TokenizeRequest(manifest, base, format, data / name, variants=variants), progress)
                self.say(f"{data / name}: {format}")
        for name, manifest_name in DECODER_DATA.items():
            if not (data / name).is_dir():
                build_decoder_data(DecoderDataRequest(corpus / f"{manifest_name}.jsonl", base, data / name), progress)
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
        if weights > MAX_SYSTEM_BYTES:
            raise MossError(
                f"{target}: {weights / 1e6:.1f} MB of weights, expected at most {MAX_SYSTEM_BYTES / 1e6:.0f}"
            )
        self.say(f"{target}: {weights / 1e6:.1f} MB of weights; moss-jax chat --model {target} --text 'Hello.'")
        return 0

    def _report(self) -> int:
        assert self.report is not None  # otherwise there is no such step
        self.report(FOLDER / "system", FOLDER / "report", self.quick)
        return 0


def _train(recipe: Recipe, name: str, say: Say) -> int:
    return train(recipe.run_config(name), say)


def shortened(run: BaseRun) -> BaseRun:
    """The run with a few steps on small batches."""
    if isinstance(run, SpeechTokenizerRun):  # one bucket only, as the step is compiled for each
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
    """The run with a share of its steps, and its schedule in proportion."""
    if share == 1:
        return run
    steps = max(round(run.steps * share), 1)
    names = ("save_every", "evaluate_every", "export_every", "log_every")
    intervals = [f"{name}={-(-getattr(run, name) * steps // run.steps)}" for name in names]
    warmup = run.optimizer.warmup_steps * steps // run.steps
    return override(
        run, [f"steps={steps}", f"optimizer.total_steps={steps}", f"optimizer.warmup_steps={warmup}", *intervals]
    )


def make_base(
    folder: Path, text_tokenizer: Path, speech_tokenizer: Path, config: SpeechLMConfig = LANGUAGE_MODEL
) -> None:
    """Writes a system with both tokenizers and the language model's config, which is enough to make examples.

    Args:
        text_tokenizer: a tokenizer.json with the special ids of `config`.
        speech_tokenizer: a folder that contains `speech_tokenizer/`.
    """
    with atomic_folder(folder) as part:
        write_json(part / SYSTEM_FILE, {"format": SYSTEM_FORMAT, "default_voice": None})
        write_json(part / "transformer" / "config.json", write_config(config))
        copy_file(text_tokenizer, part / "text_tokenizer" / "tokenizer.json")
        _copy_component("speech_tokenizer", speech_tokenizer, part)
        base = SystemFolder(part)
        TextTokenizer.from_file(base.text_tokenizer_path, config)
        codes = base.config(SPEECH_TOKENIZER).quantize_vocab_size
        if codes != config.eosp_id:
            raise MossError(f"{speech_tokenizer}: has {codes} codes, expected {config.eosp_id}, the model's eosp_id")
        (part / "voices").mkdir()


def make_system(folder: Path, *, language_model: Path, speech_decoder: Path) -> None:
    """Writes a system: the speech decoder of one folder, everything else of another.

    It has no stored voice, because its decoder was trained on a single one.
    """
    with atomic_folder(folder) as part:
        write_json(part / SYSTEM_FILE, {"format": SYSTEM_FORMAT, "default_voice": None, "sampling": SAMPLING})
        for component in ("transformer", "speech_tokenizer", "text_tokenizer"):
            _copy_component(component, language_model, part)
        _copy_component("speech_decoder", speech_decoder, part)
        (part / "voices").mkdir()
        system = SystemFolder(part)
        config = system.config(SPEECH_LM)
        TextTokenizer.from_file(system.text_tokenizer_path, config)
        decoder = system.config(SPEECH_DECODER)
        codes = decoder.flow.codebook_size
        if codes != config.eosp_id:
            raise MossError(f"{speech_decoder}: its flow has {codes} codes, the language model {config.eosp_id}")


def _copy_component(name: str, source: Path, target: Path) -> None:
    paths = [path for path in sorted((source / name).rglob("*")) if path.is_file()]
    if not paths:
        raise MossError(f"{source}: has no folder {name}")
    for path in paths:
        copy_file(path, target / path.relative_to(source))

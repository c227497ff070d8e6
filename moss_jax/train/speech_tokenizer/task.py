"""Training of a speech tokenizer as a task of the loop; see `moss_jax.train.task`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_jax.checkpoint import load_tree, save_tree
from moss_jax.checkpoint.config_io import read_config, write_config
from moss_jax.convert.files import write_json
from moss_jax.data.clips import LABELS_UNIT, ClipBatches, ClipOrder, Clips
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.files import replace_folder
from moss_jax.nn.quantize import new_codebook
from moss_jax.nn.tree import flatten
from moss_jax.progress import Say
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import encoder_shapes, init_params
from moss_jax.text.words import normalized_words, word_errors
from moss_jax.train.feed import Feed, rows_feed
from moss_jax.train.gather import gather_to_host
from moss_jax.train.preemption import Preemption
from moss_jax.train.run import RANDOM
from moss_jax.train.speech_tokenizer.head import head_shapes, init_head
from moss_jax.train.speech_tokenizer.run import Objective, SpeechTokenizerRun
from moss_jax.train.speech_tokenizer.step import CODEBOOK, Recogniser, loss_of, make_step, perplexity
from moss_jax.train.speech_tokenizer.units import BLANK, Units, WhisperUnits
from moss_jax.train.state import TrainState, new_state, shardings_of
from moss_jax.train.task import Batch, Evaluate, Flat, Step, check_rows, scalars

FOLDER = "speech_tokenizer"  # in an export, as in a system


@dataclass(frozen=True)
class _WhisperIds:
    """The keys of a Whisper's config.json that its text units need."""

    vocab_size: int
    eos_token_id: int
    decoder_start_token_id: int


def prepare(run: SpeechTokenizerRun, mesh: Mesh, say: Say) -> tuple["SpeechTokenizerTask", Flat]:
    """Loads the data and the parameters that a run starts from; see `moss_jax.train.tasks.prepare`."""
    check_rows(run.batch_size, mesh)
    clips = _open(run, run.data)
    recogniser, units = _recogniser(run, clips)
    encoder_key, head_key = jax.random.split(jax.random.key(run.seed))
    new = {"encoder": init_params(run.model, encoder_key), "head": init_head(recogniser.head, head_key)}
    loaded, trained_codebook = _load_parameters(run, flatten(new), say)
    task = SpeechTokenizerTask(run, clips, recogniser, units, trained_codebook, mesh, say)
    return task, jax.device_put(loaded, NamedSharding(mesh, P()))


def _recogniser(run: SpeechTokenizerRun, clips: Clips) -> tuple[Recogniser, Units | WhisperUnits]:
    """What recognises the transcripts from the codes, and the text units that it predicts."""
    if run.objective.units == "whisper":
        path = Path(run.init) / "config.json"
        ids = read_config(_WhisperIds, read_json(path), path, foreign=True)
        units: Units | WhisperUnits = WhisperUnits(run.init, ids.vocab_size)
        begin = run.objective.prompt or (ids.decoder_start_token_id,)
        end = ids.eos_token_id
    else:
        units = Units(clips.texts, run.objective.units, run.objective.vocabulary)
        begin = (BLANK,)
        end = BLANK
    return Recogniser(run.model, run.objective, units.count, begin, end), units


def _load_parameters(run: SpeechTokenizerRun, new: Flat, say: Say) -> tuple[dict[str, Any], bool]:
    """(parameters of `run.init`, new ones where it has none; whether the codebook among them is a trained one)."""
    init = Path(run.init)
    if run.init == RANDOM:
        return new, False
    folder = init / FOLDER if (init / FOLDER).is_dir() else init
    if not (folder / "config.json").is_file():
        raise MossError(f"{init}: no config.json in it, expected a speech tokenizer, a Whisper, or init=random")
    data = read_json(folder / "config.json")
    if data.get("model_type") == "whisper":
        from moss_jax.convert.whisper import import_whisper

        return new | import_whisper(folder, run.model, new, say), False
    config = read_config(SpeechTokenizerConfig, data, folder / "config.json")
    if config != run.model:
        raise MossError(f"{folder}: its speech tokenizer has other sizes than the run's model")
    encoder = flatten(load_tree(folder, encoder_shapes(config), dtype=np.float32))
    return new | {f"encoder/{path}": value for path, value in encoder.items()}, True


def _open(run: SpeechTokenizerRun, manifests: tuple[str, ...]) -> Clips:
    config = run.model
    return Clips(manifests, config.sample_rate, run.buckets, config.samples_per_code)


class SpeechTokenizerTask:
    """The task of a `SpeechTokenizerRun`: `encoder/...` (without the codebook) and `head/...` train by gradient, the
    codebook by exponential moving averages (EMA) in `extra`.

    Args:
        clips: the training data.
        recogniser: predicts the transcripts from the codes.
        units: the text units of the transcripts.
        trained_codebook: whether the initial codebook comes from an earlier training.
        mesh: where all arrays are placed.
        say: receives progress lines.
    """

    def __init__(
        self,
        run: SpeechTokenizerRun,
        clips: Clips,
        recogniser: Recogniser,
        units: Units | WhisperUnits,
        trained_codebook: bool,
        mesh: Mesh,
        say: Say,
    ):
        self.frozen: Flat = {}
        self.description = f"speech tokenizer, {run.objective.head} over {run.objective.units},"
        self.batch_description = f"{run.batch_size} clips of up to {run.buckets[-1]:g} s"
        self._run = run
        self._clips = clips
        self._recogniser = recogniser
        self._units = units
        self._trained_codebook = trained_codebook
        self._mesh = mesh
        self._say = say
        # Copied to every device: the model is small compared to a batch of audio.
        self._replicated = NamedSharding(mesh, P())

    def _shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {f"encoder/{path}": shape for path, shape in encoder_shapes(self._run.model).items()}
        return shapes | {f"head/{path}": shape for path, shape in head_shapes(self._recogniser.head).items()}

    def state_shardings(self) -> Any:
        shapes = self._shapes()
        trained_by_gradient = {path: self._replicated for path in shapes if path != CODEBOOK}
        return shardings_of(jax.eval_shape(self.new_state, shapes), trained_by_gradient, self._mesh)

    def feed(self) -> Feed:
        if self._clips.skipped:
            longest = self._run.buckets[-1]
            self._say(f"note: {self._clips.skipped} recordings are longer than {longest:g} s and are left out")
        return self._feed(self._clips, self._run.workers)

    def new_state(self, parameters: Flat) -> TrainState:
        trainable = {path: value for path, value in parameters.items() if path != CODEBOOK}
        codebook = new_codebook(parameters[CODEBOOK], self._trained_codebook)
        return new_state(trainable, self._run.optimizer, codebook)

    def make_step(self) -> Step:
        out = self.state_shardings(), self._replicated
        return make_step(self._recogniser, self._run.optimizer, self._run.seed, out)

    def evaluation(self) -> Evaluate | None:
        if not self._run.held_out:
            return None
        return self.evaluation_on(self._run.held_out, self._run.evaluate_batches)

    def evaluation_on(self, manifests: tuple[str, ...], batches: int | None = None) -> "Evaluation":
        """The evaluation on the clips of some manifests.

        Args:
            batches: at most this many; None: one epoch.
        """
        run = self._run
        clips = _open(run, manifests)
        epoch = ClipOrder(clips.bucket, run.batch_size, run.seed).per_epoch
        batches = epoch if batches is None else min(batches, epoch)
        return Evaluation(run.objective, self._recogniser, self._units, clips, self._feed(clips), batches, self._mesh)

    def compatibility(self) -> dict[str, dict[str, Any]]:
        objective = write_config(self._run.objective)
        del objective["commitment_from"]
        names = json.dumps(getattr(self._units, "names", self._units.count)).encode()
        objective["transcripts"] = hashlib.blake2b(names, digest_size=16).hexdigest()
        return {"architecture": write_config(self._run.model), "objective": objective}

    def tokens(self, batch: Batch) -> int:
        return batch["wave"].size // self._run.model.sample_rate

    def flops(self, batch: Batch) -> float:
        """6 FLOP per weight and position it is applied to, plus attention; convolutions count at their own rates."""
        config = self._run.model
        (rows, samples) = batch["wave"].shape
        codes = samples // config.samples_per_code
        frames = codes * config.pooling_kernel_size
        total = 0.0
        positions = {"encoder/conv1": 2 * frames, "encoder/conv2": frames, "encoder/layers": frames}
        for path, shape in self._shapes().items():
            if path.endswith("kernel"):
                total += 6 * positions.get("/".join(path.split("/")[:2]), codes) * float(np.prod(shape.shape))
        attention = config.num_layers * frames**2 / 2 + self._run.objective.layers * codes**2
        return rows * float(total + 12 * attention * config.d_model)

    def log_entry(self, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return scalars(metrics)

    def export(self, state: TrainState, folder: Path, dtype: str | None = None) -> None:
        """Writes `speech_tokenizer/` as in a system, parameters as float32 or the given dtype."""
        dtype = dtype or self._run.export_dtype or "float32"
        encoder = {
            path.removeprefix("encoder/"): value for path, value in state.params.items() if path.startswith("encoder/")
        } | {"codebook": state.extra["codebook"]}
        values = {path: gather_to_host(value.astype(dtype)) for path, value in encoder.items()}
        if jax.process_index():
            return
        with replace_folder(folder) as part:
            (part / FOLDER).mkdir()
            save_tree(part / FOLDER, values)
            write_json(part / FOLDER / "config.json", write_config(self._run.model))
        self._say(f"exported: {folder}")

    def _feed(self, clips: Clips, workers: int = 0) -> Feed:
        run = self._run

        def open_part(index: int, count: int) -> ClipBatches:
            batches = ClipBatches(clips, self._units, run.batch_size, run.seed, index, count, workers)
            needed = -(-batches.max_labels // LABELS_UNIT) * LABELS_UNIT + len(self._recogniser.begin)
            if run.objective.head == "attention" and needed > run.objective.max_units:
                raise MossError(f"objective: max_units is {run.objective.max_units}, expected {needed} for this data")
            return batches

        return rows_feed(run.batch_size, self._mesh, open_part)


class Evaluation:
    """Losses, word error rate and use of the codes on the first `batches` batches of some clips.

    Attributes:
        by_clip: (errors, words) of each clip of the latest evaluation.
    """

    def __init__(
        self,
        objective: Objective,
        recogniser: Recogniser,
        units: Units | WhisperUnits,
        clips: Clips,
        feed: Feed,
        batches: int,
        mesh: Mesh,
    ):
        self.by_clip: list[tuple[int, int]] = []
        self._objective = objective
        self._recogniser = recogniser
        self._units = units
        self._clips = clips
        self._feed = feed
        self._batches = batches

        def measure(params: Flat, codebook: jax.Array, batch: Batch) -> tuple[Any, ...]:
            sums = recogniser.sums(params, codebook, batch)
            size = codebook.shape[0]
            usage = jax.ops.segment_sum(sums["valid"].astype(np.float32).ravel(), sums["codes"].ravel(), size)
            recognised = recogniser.recognised(params, sums, batch["labels"].shape[1])
            losses = {name: sums[name] for name in ("asr", "mel", "commitment")}
            return losses, usage, recognised, batch["clip"], batch["weight"]

        self._measure = jax.jit(measure, out_shardings=NamedSharding(mesh, P()))

    def __call__(self, state: TrainState, preemption: Preemption) -> dict[str, Any] | None:
        """{"loss", "asr_loss", "mel_loss", "commitment_loss", "wer", "words", "perplexity", "code_use"}; None when a
        preemption notice arrived meanwhile."""
        totals: dict[str, Any] = {}
        usage = np.zeros(state.extra["codebook"].shape[0], np.float64)  # how often each code was chosen
        self.by_clip = []
        self._feed.skip_to(0)
        try:
            for _ in range(self._batches):
                if preemption.asked:
                    return None
                sums, chosen, recognised, clips, weights = jax.device_get(
                    self._measure(state.params, state.extra["codebook"], next(self._feed))
                )
                for name, pair in sums.items():
                    totals[name] = totals.get(name, 0) + np.asarray(pair, np.float64)
                usage += chosen
                for row in np.flatnonzero(weights):
                    reference = normalized_words(self._clips.texts[clips[row]])
                    hypothesis = normalized_words(self._units.text(self._transcript(recognised[row])))
                    self.by_clip.append((word_errors(reference, hypothesis), len(reference)))
        finally:
            self._feed.close()
        loss, parts = loss_of(totals, self._objective, self._objective.commitment_from)
        wrong, count = (sum(column) for column in zip(*self.by_clip, strict=True))
        return {
            "loss": float(loss),
            **{name: float(value) for name, value in parts.items()},
            "wer": wrong / max(count, 1),
            "words": count,
            "perplexity": float(perplexity(usage)),
            "code_use": float((usage > 0).mean()),
        }

    def _transcript(self, recognised: np.ndarray) -> list[int]:
        if self._objective.head == "ctc":
            changes = np.append(True, recognised[1:] != recognised[:-1])
            return [int(unit) for unit in recognised[changes] if unit != BLANK]
        ends = np.flatnonzero(recognised == self._recogniser.end)
        return [int(unit) for unit in recognised[: ends[0] if len(ends) else None]]

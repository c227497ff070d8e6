"""Training of a speech tokenizer as a task of the loop; see `moss_jax.train.task`."""

import hashlib
import json
from collections.abc import Callable, Mapping
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
from moss_jax.data.clips import LABELS_UNIT, ClipBatches, Clips
from moss_jax.data.words import errors, words
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.files import replace_folder
from moss_jax.nn.quantize import new_codebook
from moss_jax.nn.tree import flatten
from moss_jax.progress import Say
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import encoder_shapes, init_params
from moss_jax.train.feed import ClipFeed
from moss_jax.train.gather import gather_to_host
from moss_jax.train.preemption import Preemption
from moss_jax.train.speech_tokenizer.head import head_shapes, init_head
from moss_jax.train.speech_tokenizer.run import Objective, SpeechTokenizerRun
from moss_jax.train.speech_tokenizer.step import CODEBOOK, Recogniser, loss_of, make_step, perplexity
from moss_jax.train.speech_tokenizer.units import BLANK, Units, WhisperUnits
from moss_jax.train.state import TrainState, new_state, shardings_of
from moss_jax.train.task import Batch, Flat, Step, check_rows, scalars

ROOM = "speech_tokenizer"  # of an export, as in a system


@dataclass(frozen=True)
class _WhisperIds:
    """The keys of a Whisper's config.json that its text units need."""

    vocab_size: int
    eos_token_id: int
    decoder_start_token_id: int


class SpeechTokenizerTask:
    """The task of a `SpeechTokenizerRun`: `encoder/...` (without the codebook) and `head/...` train by gradient, the
    codebook by moving averages in `extra`.

    Raises:
        MossError: a batch does not divide over the mesh.
    """

    def __init__(self, run: SpeechTokenizerRun, mesh: Mesh, say: Say):
        check_rows(run.batch_size, mesh)
        self._run = run
        self._mesh = mesh
        self._say = say
        self.frozen: Flat = {}
        self.what = f"speech tokenizer, {run.objective.head} over {run.objective.units},"
        self.rows = f"{run.batch_size} clips of up to {run.buckets[-1]:g} s"

    def start(self) -> Flat:
        run = self._run
        self._clips = self._open(run.data)
        begin = (BLANK,)
        end = BLANK
        if run.objective.units == "whisper":
            path = Path(run.init) / "config.json"
            about = read_config(_WhisperIds, read_json(path), path, foreign=True)
            self._units = WhisperUnits(run.init, about.vocab_size)
            begin = run.objective.prompt or (about.decoder_start_token_id,)
            end = about.eos_token_id
        else:
            self._units = Units(self._clips.texts, run.objective.units, run.objective.vocabulary)
        self._recogniser = Recogniser(run.model, run.objective, self._units.count, begin, end)
        parameters = self._parameters()
        everywhere = NamedSharding(self._mesh, P())
        return jax.device_put(parameters, {path: self._shardings.get(path, everywhere) for path in parameters})

    @property
    def _shardings(self) -> dict[str, NamedSharding]:
        """Of what trains by gradient: copied to every device, the model being small beside a batch of sound."""
        everywhere = NamedSharding(self._mesh, P())
        head = self._recogniser.head
        paths = [f"encoder/{path}" for path in encoder_shapes(self._run.model)]
        paths += [f"head/{path}" for path in head_shapes(head)]
        return {path: everywhere for path in paths if path != CODEBOOK}

    def _parameters(self) -> Flat:
        run = self._run
        init = Path(self._run.init)
        encoder_key, head_key = jax.random.split(jax.random.key(run.seed))
        fresh = {"encoder": init_params(run.model, encoder_key), "head": init_head(self._recogniser.head, head_key)}
        parameters = flatten(fresh)
        self._trained = False
        if run.init == "random":
            return parameters
        room = init / ROOM if (init / ROOM).is_dir() else init
        if not (room / "config.json").is_file():
            raise MossError(f"{init}: no config.json in it, expected a speech tokenizer, a Whisper, or init=random")
        about = read_json(room / "config.json")
        if about.get("model_type") == "whisper":
            from moss_jax.convert.whisper import import_whisper

            return parameters | import_whisper(room, run.model, parameters, self._say)
        config = read_config(SpeechTokenizerConfig, about, room / "config.json")
        if config != run.model:
            raise MossError(f"{room}: its speech tokenizer has other sizes than the run's model")
        self._trained = True
        found = flatten(load_tree(room, encoder_shapes(config), dtype=np.float32))
        return parameters | {f"encoder/{path}": value for path, value in found.items()}

    def state_shardings(self) -> TrainState:
        shapes = {path: jax.ShapeDtypeStruct(s.shape, s.dtype) for path, s in self._all_shapes().items()}
        return shardings_of(jax.eval_shape(self.new_state, shapes), self._shardings, self._mesh)

    def _all_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {f"encoder/{path}": shape for path, shape in encoder_shapes(self._run.model).items()}
        return shapes | {f"head/{path}": shape for path, shape in head_shapes(self._recogniser.head).items()}

    def feed(self) -> ClipFeed:
        if self._clips.left_out:
            self._say(f"note: {self._clips.left_out} recordings are longer than {self._run.buckets[-1]:g} s: left out")
        return self._feed(self._clips, self._run.workers)

    def new_state(self, parameters: Flat) -> TrainState:
        trainable = {path: value for path, value in parameters.items() if path != CODEBOOK}
        return new_state(trainable, self._run.optimizer, new_codebook(parameters[CODEBOOK], self._trained))

    def make_step(self) -> Step:
        out = self.state_shardings(), NamedSharding(self._mesh, P())
        return make_step(self._recogniser, self._run.optimizer, self._run.seed, out)

    def evaluation(self) -> Callable[[TrainState, Preemption], dict[str, Any] | None] | None:
        if not self._run.held_out:
            return None
        return self.evaluation_on(self._run.held_out, self._run.evaluate_batches)

    def evaluation_on(self, manifests: tuple[str, ...], batches: int | None = None) -> "Evaluation":
        """The evaluation on some manifests; after `start`."""
        clips = self._open(manifests)
        feed = self._feed(clips)
        batches = feed.per_epoch if batches is None else min(batches, feed.per_epoch)
        return Evaluation(self._run.objective, self._recogniser, self._units, clips, feed, batches, self._mesh)

    def described(self) -> dict[str, dict[str, Any]]:
        objective = {
            name: value for name, value in write_config(self._run.objective).items() if name != "commitment_from"
        }
        names = json.dumps(getattr(self._units, "names", self._units.count)).encode()
        objective["transcripts"] = hashlib.blake2b(names, digest_size=16).hexdigest()
        return {"architecture": write_config(self._run.model), "objective": objective}

    def tokens(self, batch: Batch) -> int:
        return batch["wave"].size // self._run.model.sample_rate

    def flops(self, batch: Batch) -> float:
        """6 a weight and place that it is used at, attention as its square; convolutions at their own rates."""
        config = self._run.model
        (rows, samples) = batch["wave"].shape
        codes = samples // config.samples_per_code
        frames = codes * config.pooling_kernel_size
        total = 0.0
        rates = {"encoder/conv1": 2 * frames, "encoder/conv2": frames, "encoder/layers": frames}
        for path, shape in self._all_shapes().items():
            if path.endswith("kernel"):
                total += 6 * rates.get("/".join(path.split("/")[:2]), codes) * float(np.prod(shape.shape))
        attention = config.num_layers * frames**2 / 2 + self._run.objective.layers * codes**2
        return rows * float(total + 12 * attention * config.d_model)

    def entry(self, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return scalars(metrics)

    def export(self, state: TrainState, folder: Path, dtype: str | None = None) -> None:
        """Writes `speech_tokenizer/` as in a system, parameters as float32 or what is asked for."""
        dtype = dtype or self._run.export_dtype or "float32"
        encoder = {
            path.removeprefix("encoder/"): value for path, value in state.params.items() if path.startswith("encoder/")
        } | {"codebook": state.extra["codebook"]}
        values = {path: gather_to_host(value.astype(dtype)) for path, value in encoder.items()}
        if jax.process_index():
            return
        with replace_folder(folder) as part:
            (part / ROOM).mkdir()
            save_tree(part / ROOM, values)
            write_json(part / ROOM / "config.json", write_config(self._run.model))
        self._say(f"exported: {folder}")

    def _open(self, manifests: tuple[str, ...]) -> Clips:
        config = self._run.model
        return Clips(manifests, config.sample_rate, self._run.buckets, config.samples_per_code)

    def _feed(self, clips: Clips, workers: int = 0) -> ClipFeed:
        run = self._run

        def open_part(index: int, count: int) -> ClipBatches:
            batches = ClipBatches(clips, self._units, run.batch_size, run.seed, index, count, workers)
            needed = -(-batches.most_labels // LABELS_UNIT) * LABELS_UNIT + len(self._recogniser.begin)
            if run.objective.head == "attention" and needed > run.objective.max_units:
                raise MossError(f"objective: max_units is {run.objective.max_units}, expected {needed} for this data")
            return batches

        return ClipFeed(run.batch_size, self._mesh, open_part)


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
        feed: ClipFeed,
        batches: int,
        mesh: Mesh,
    ):
        self._objective = objective
        self._recogniser = recogniser
        self._units = units
        self._clips = clips
        self._feed = feed
        self._batches = batches

        def measured(params, codebook, batch):
            sums = recogniser.sums(params, codebook, batch)
            size = codebook.shape[0]
            chosen = jax.ops.segment_sum(sums["valid"].astype(np.float32).ravel(), sums["codes"].ravel(), size)
            found = recogniser.recognised(params, sums, batch["labels"].shape[1])
            losses = {name: sums[name] for name in ("asr", "mel", "commitment")}
            return losses, chosen, found, batch["clip"], batch["weight"]

        self._measured = jax.jit(measured, out_shardings=NamedSharding(mesh, P()))

    def __call__(self, state: TrainState, preemption: Preemption) -> dict[str, Any] | None:
        """{"loss", "asr_loss", "mel_loss", "commitment_loss", "wer", "words", "perplexity", "code_use"}; None when a
        notice to end came meanwhile."""
        totals = {}
        used = 0.0
        self.by_clip = []
        self._feed.skip_to(0)
        try:
            for _ in range(self._batches):
                if preemption.asked:
                    return None
                sums, chosen, found, clips, weights = jax.device_get(
                    self._measured(state.params, state.extra["codebook"], next(self._feed))
                )
                for name, pair in sums.items():
                    totals[name] = totals.get(name, 0) + np.asarray(pair, np.float64)
                used = used + chosen.astype(np.float64)
                for row in np.flatnonzero(weights):
                    expected = words(self._clips.texts[clips[row]])
                    heard = words(self._units.text(self._transcript(found[row])))
                    self.by_clip.append((errors(expected, heard), len(expected)))
        finally:
            self._feed.close()
        loss, parts = loss_of(totals, self._objective, self._objective.commitment_from)
        wrong, said = (sum(column) for column in zip(*self.by_clip, strict=True))
        return {
            "loss": float(loss),
            **{name: float(value) for name, value in parts.items()},
            "wer": wrong / max(said, 1),
            "words": said,
            "perplexity": float(perplexity(used)),
            "code_use": float((used > 0).mean()),
        }

    def _transcript(self, found: np.ndarray) -> list[int]:
        if self._objective.head == "ctc":
            first = np.append(True, found[1:] != found[:-1])
            return [int(unit) for unit in found[first] if unit != BLANK]
        ended = np.flatnonzero(found == self._recogniser.end)
        return [int(unit) for unit in found[: ended[0] if len(ended) else None]]

"""Flow and vocoder as tasks of the loop; see `moss_jax.train.task`.

Parameters are replicated on every device, the rows of a batch are divided. Random numbers derive from (seed, step).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_jax.checkpoint import load_tree
from moss_jax.checkpoint.config_io import write_config
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.data import Mixture
from moss_jax.data.decoder_batches import DecoderBatches
from moss_jax.data.decoder_data import DecoderDataset
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.progress import Say
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_decoder.config import SpeechDecoderConfig, flow_stem
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.flow.model import FlowModel, flow_shapes
from moss_jax.speech_decoder.vocoder import HiFT, VocoderConfig, vocoder_shapes
from moss_jax.train.feed import Feed, rows_feed
from moss_jax.train.preemption import Preemption
from moss_jax.train.run import RANDOM
from moss_jax.train.run_folder import resolve_init
from moss_jax.train.speech_decoder.discriminators import Discriminators
from moss_jax.train.speech_decoder.export import export_parts
from moss_jax.train.speech_decoder.flops import flow_flops, vocoder_flops
from moss_jax.train.speech_decoder.flow import FlowObjective, centred, draw, squared_error, velocity
from moss_jax.train.speech_decoder.run import FlowRun, SpeechDecoderRun, VocoderRun
from moss_jax.train.speech_decoder.vocoder import VocoderObjective, cast, losses, mel_distance, render
from moss_jax.train.state import TrainState, apply_update, new_state, shardings_of
from moss_jax.train.task import Batch, Evaluate, Flat, Step, check_rows, scalars

# prefixes of the paths of parameters in a vocoder's run; they are part of its checkpoints
VOCODER = "vocoder/"
DISCRIMINATORS = "judges/"
R = TypeVar("R", bound=SpeechDecoderRun)


def prepare_flow(run: FlowRun, mesh: Mesh, say: Say) -> tuple["FlowTask", Flat]:
    """Loads or makes the parameters that a run starts from; see `moss_jax.train.tasks.prepare`."""
    task = FlowTask(run, mesh, say)
    return task, task.initial_parameters()


def prepare_vocoder(run: VocoderRun, mesh: Mesh, say: Say) -> tuple["VocoderTask", Flat]:
    """Loads or makes the parameters that a run starts from; see `moss_jax.train.tasks.prepare`."""
    task = VocoderTask(run, mesh, say)
    return task, task.initial_parameters()


class SpeechDecoderTask(ABC, Generic[R]):
    """What both tasks share.

    Args:
        mesh: where all arrays are placed.
        say: receives progress lines.

    Raises:
        MossError: a batch does not divide over the mesh, or the system of the run does not exist.
    """

    description: str
    batch_description: str

    def __init__(self, run: R, mesh: Mesh, say: Say):
        check_rows(run.batch_size, mesh)
        self._run = run
        self._mesh = mesh
        self._say = say
        self.frozen: Flat = {}
        self._replicated = NamedSharding(mesh, P())
        self.config = self._model_config()
        if run.system is not None and not Path(resolve_init(run.system)).is_dir():
            raise MossError(f"{run.system}: no such folder, expected the system that an export is completed from")

    @staticmethod
    @abstractmethod
    def _trained_config(config: SpeechDecoderConfig) -> FlowConfig | VocoderConfig:
        """The config of the part that trains."""

    @abstractmethod
    def _shapes(self) -> dict[str, Any]:
        """Shapes of the parameters that train."""

    @abstractmethod
    def _row_length(self) -> dict[str, int]:
        """The length of a row of a batch, as `DecoderBatches` takes it."""

    @abstractmethod
    def _objective(self) -> Any:
        """The objective of the run, a dataclass."""

    @abstractmethod
    def _loss(self, params: Flat, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Batch]:
        """(the loss, further metrics) of a batch."""

    @abstractmethod
    def _evaluate(self, params: Flat, batch: Batch, key: jax.Array) -> Batch:
        """The metrics of a held-out batch, "loss" among them."""

    def _model_config(self) -> SpeechDecoderConfig:
        run = self._run
        source = run.init if run.init != RANDOM else run.system
        found = None
        if source is not None and (run.init != RANDOM or run.model is None):
            found = SystemFolder(resolve_init(source)).config(SPEECH_DECODER)
        if run.model is None:
            assert found is not None  # the run has checked that one of init, model and system is given
            return found
        if found is not None and self._trained_config(found) != self._trained_config(run.model):
            raise MossError(f"{run.init}: its speech decoder has other sizes than the run's model")
        return run.model

    def _load(self, stem: str, shapes: Mapping[str, Any]) -> Flat:
        path = Path(resolve_init(self._run.init)) / "speech_decoder" / f"{stem}.safetensors"
        return flatten(load_tree(path, shapes, self._replicated, jnp.float32))

    def state_shardings(self) -> Any:
        state = jax.eval_shape(self.new_state, self._shapes())
        return shardings_of(state, {path: self._replicated for path in state.params}, self._mesh)

    def new_state(self, parameters: Flat) -> TrainState:
        ema = {path: jnp.copy(leaf) for path, leaf in parameters.items()} if self._run.ema_decay else ()
        return new_state(parameters, self._run.optimizer, ema)

    def feed(self) -> Feed:
        return self._feed(self._run.data, self._run.workers)

    def _feed(self, mixture: Mixture, workers: int) -> Feed:
        def open_part(index: int, count: int) -> DecoderBatches:
            return DecoderBatches(
                mixture,
                self.config,
                batch_size=self._run.batch_size,
                process_index=index,
                process_count=count,
                workers=workers,
                **self._row_length(),
            )

        return rows_feed(self._run.batch_size, self._mesh, open_part)

    def make_step(self) -> Step:
        run = self._run

        def step(
            state: TrainState, frozen: Flat, batch: Batch, limit: np.ndarray
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            key = jax.random.fold_in(jax.random.key(run.seed), state.step)
            gradient = jax.value_and_grad(self._loss, has_aux=True)
            (loss, terms), grads = gradient(state.params, batch, key, state.step)
            ema = state.extra
            if run.ema_decay:
                # The decay starts low, so that the average soon forgets the initial weights.
                decay = jnp.minimum(run.ema_decay, (1 + state.step) / (10 + state.step)).astype(jnp.float32)
                ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.extra, state.params)
            state, metrics = apply_update(state, grads, loss, limit, run.optimizer, ema)
            return state, metrics | terms | {"loss": loss}

        return jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings(), self._replicated))

    def evaluation(self) -> Evaluate | None:
        run = self._run
        if run.held_out is None:
            return None
        feed = self._feed(run.held_out, 0)
        evaluate_batch = jax.jit(self._evaluate, out_shardings=self._replicated)

        def evaluate(state: TrainState, preemption: Preemption) -> dict[str, Any] | None:
            feed.skip_to(0)
            entries = []
            try:
                for index in range(run.evaluate_batches):
                    if preemption.asked:
                        return None
                    key = jax.random.fold_in(jax.random.key(run.seed + 1), index)
                    entries.append(jax.device_get(evaluate_batch(self._averaged(state), next(feed), key)))
            finally:
                feed.close()
            return {name: float(np.mean([entry[name] for entry in entries])) for name in entries[0]}

        return evaluate

    def _averaged(self, state: TrainState) -> Flat:
        """The parameters that are evaluated and exported: the moving average, if there is one."""
        return state.extra if self._run.ema_decay else state.params

    def compatibility(self) -> dict[str, dict[str, Any]]:
        return {
            "architecture": write_config(self._trained_config(self.config)),
            "objective": write_config(self._objective()),
        }

    def log_entry(self, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return scalars(metrics)


class FlowTask(SpeechDecoderTask[FlowRun]):
    """The task of a `FlowRun`."""

    description = "flow"

    def __init__(self, run: FlowRun, mesh: Mesh, say: Say):
        super().__init__(run, mesh, say)
        self.batch_description = f"{run.batch_size} x {run.codes} codes"

    @staticmethod
    def _trained_config(config: SpeechDecoderConfig) -> FlowConfig:
        return config.flow

    def _shapes(self) -> dict[str, Any]:
        return flow_shapes(self.config.flow)

    def _row_length(self) -> dict[str, int]:
        return {"codes": self._run.codes}

    def _objective(self) -> FlowObjective:
        return self._run.objective

    def initial_parameters(self) -> Flat:
        """The parameters of `init`, or random ones, on the mesh."""
        run = self._run
        config = self.config.flow
        if run.init != RANDOM:
            return self._load(flow_stem(), flow_shapes(config))
        params = jax.jit(lambda key: flatten(nn.unbox(FlowModel(config).init(key))["params"]))(jax.random.key(run.seed))
        about = [DecoderDataset(folder, self.config, True).about for _, folder, _ in run.data.sources]
        mean = np.average([entry["mel_mean"] for entry in about], 0, [weight for *_, weight in run.data.sources])
        return jax.device_put(centred(params, config, mean), self._replicated)

    def _errors(self, params: Flat, batch: Batch, drawn: Mapping[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(error of the velocity, error of the encoder's mel, number of frames) of each item, float32 [B] each; the
        errors are sums over the item's frames."""
        dtype = jnp.dtype(self._run.dtype)
        nested = unflatten({path: leaf.astype(dtype) for path, leaf in params.items()})
        config = self.config.flow
        predicted, target, encoded, valid = velocity(nested, config, batch, drawn, self._run.objective.sigma, dtype)
        prior = squared_error(encoded, config.normalized(batch["mel"]), valid)
        return squared_error(predicted, target, valid), prior, valid.sum(1).astype(jnp.float32)

    def _loss(self, params: Flat, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Batch]:
        codes = batch["codes"].shape[1]
        drawn = draw(key, self._run.objective, self.config.flow, batch["count"], codes)
        errors, priors, frames = self._errors(params, batch, drawn)
        streamed = drawn["chunk"] < codes  # items that draw() gave a chunk mask
        prior = _mean(priors, frames)
        terms = {"prior_loss": prior}
        for name, selected in (("offline", ~streamed), ("stream", streamed)):
            terms[f"{name}_loss"] = _mean(errors, frames, selected)
            terms[f"{name}_count"] = jnp.where(selected, frames, 0).sum()
        return _mean(errors, frames) + self._run.objective.prior * prior, terms

    def _evaluate(self, params: Flat, batch: Batch, key: jax.Array) -> Batch:
        """With all conditions: the errors offline and in a stream, and their mean as the loss."""
        config = self.config.flow
        codes = batch["codes"].shape[1]
        objective = FlowObjective(drop=0.0, prompt=0.0, chunks=(0,), sigma=self._run.objective.sigma)
        offline = draw(key, objective, config, batch["count"], codes)
        stream = offline | {"chunk": jnp.full_like(offline["chunk"], config.chunk)}
        metrics = {}
        for name, drawn in (("offline", offline), ("stream", stream)):
            errors, priors, frames = self._errors(params, batch, drawn)
            metrics[f"{name}_loss"] = _mean(errors, frames)
            metrics["prior_loss"] = _mean(priors, frames)
        return {"loss": (metrics["offline_loss"] + metrics["stream_loss"]) / 2, **metrics}

    def tokens(self, batch: Batch) -> int:
        return self._run.batch_size * self._run.codes * self.config.flow.frames_per_code

    def flops(self, batch: Batch) -> float:
        return flow_flops(self.config.flow, self._run.batch_size * self._run.codes)

    def export(self, state: TrainState, folder: Path, dtype: str | None = None) -> None:
        """Writes one set of weights, under the name of every chunk size of the config."""
        params = self._averaged(state)
        trained = self.config
        parts = {flow_stem(chunk): params for chunk in (None, *trained.chunks)}

        def merge(config: SpeechDecoderConfig) -> SpeechDecoderConfig:
            return replace(config, flow=trained.flow, speaker=trained.speaker, chunks=trained.chunks)

        export_parts(self._run, trained, merge, "flow*", parts, folder, dtype, self._say)


def _mean(errors: jax.Array, frames: jax.Array, selected: jax.Array | bool = True) -> jax.Array:
    """Sums over frames, float32 [B] -> the mean per frame over the selected items; 0 where none is selected."""
    return jnp.where(selected, errors, 0).sum() / jnp.maximum(jnp.where(selected, frames, 0).sum(), 1)


class VocoderTask(SpeechDecoderTask[VocoderRun]):
    """The task of a `VocoderRun`."""

    description = "vocoder"

    def __init__(self, run: VocoderRun, mesh: Mesh, say: Say):
        super().__init__(run, mesh, say)
        self.config = replace(self.config, vocoder=replace(self.config.vocoder, weight_norm=True))
        minimum = run.objective.shortest(self.config.vocoder)
        if run.frames < minimum:
            raise MossError(f"run: frames is {run.frames}, expected at least {minimum} for its resolutions")
        self.batch_description = f"{run.batch_size} x {run.frames} frames"

    @staticmethod
    def _trained_config(config: SpeechDecoderConfig) -> VocoderConfig:
        return config.vocoder

    def _row_length(self) -> dict[str, int]:
        return {"frames": self._run.frames}

    def _objective(self) -> VocoderObjective:
        return self._run.objective

    def _shapes(self) -> dict[str, Any]:
        shapes: dict[str, Any] = {VOCODER + path: leaf for path, leaf in vocoder_shapes(self.config.vocoder).items()}
        if self._run.objective.discriminators is not None:
            shapes |= jax.eval_shape(self._new_discriminators, jax.random.key(0))
        return shapes

    def initial_parameters(self) -> Flat:
        """The parameters of `init`, or random ones, and new discriminators, on the mesh."""
        run = self._run
        config = self.config.vocoder
        keys = jax.random.split(jax.random.key(run.seed))
        if run.init != RANDOM:
            params = self._load("vocoder", vocoder_shapes(config))
        else:

            def new(key: jax.Array) -> Flat:
                mel = jnp.zeros((1, 4, config.mel_bins))
                noise = jnp.zeros((1, 4 * config.hop, config.harmonics))
                return flatten(nn.unbox(HiFT(config).init(key, mel, noise))["params"])

            params = jax.jit(new)(keys[0])
        params = {VOCODER + path: leaf for path, leaf in params.items()}
        if run.objective.discriminators is not None:
            params |= jax.jit(self._new_discriminators)(keys[1])
        return jax.device_put(params, self._replicated)

    def _new_discriminators(self, key: jax.Array) -> Flat:
        config = self._run.objective.discriminators
        assert config is not None
        wave = jnp.zeros((1, self._run.frames * self.config.vocoder.hop))
        params = flatten(nn.unbox(Discriminators(config).init(key, wave))["params"])
        return {DISCRIMINATORS + path: leaf for path, leaf in params.items()}

    def _nested(self, params: Flat) -> tuple[Any, Any]:
        """(the vocoder's parameters in the run's dtype, the discriminators'), nested."""
        dtype = jnp.dtype(self._run.dtype)
        return unflatten(cast(_below(VOCODER, params), dtype)), unflatten(_below(DISCRIMINATORS, params))

    def _loss(self, params: Flat, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Batch]:
        vocoder, discriminators = self._nested(params)
        run = self._run
        dtype = jnp.dtype(run.dtype)
        return losses(vocoder, discriminators, self.config.vocoder, run.objective, batch, key, step, dtype)

    def _evaluate(self, params: Flat, batch: Batch, key: jax.Array) -> Batch:
        vocoder, _ = self._nested(params)
        run = self._run
        config = self.config.vocoder
        objective = replace(run.objective, true_f0=0.0, discriminators=None)
        loss, terms = losses(vocoder, None, config, objective, batch, key, jnp.int32(0), jnp.dtype(run.dtype))
        wave, _ = render(vocoder, config, batch, key, 0.0, jnp.dtype(run.dtype))
        return {"loss": loss, **terms, "mel_distance": mel_distance(wave, batch["wave"], config)}

    def tokens(self, batch: Batch) -> int:
        return self._run.batch_size * self._run.frames

    def flops(self, batch: Batch) -> float:
        return vocoder_flops(self.config.vocoder, self.tokens(batch))

    def export(self, state: TrainState, folder: Path, dtype: str | None = None) -> None:
        trained = self.config

        def merge(config: SpeechDecoderConfig) -> SpeechDecoderConfig:
            return replace(
                config, vocoder=trained.vocoder, mel_overlap=trained.mel_overlap, mel_context=trained.mel_context
            )

        parts = {"vocoder": _below(VOCODER, self._averaged(state))}
        export_parts(self._run, trained, merge, "vocoder", parts, folder, dtype, self._say)


def _below(prefix: str, params: Flat) -> Flat:
    """The parameters whose paths start with a prefix, without it."""
    return {path.removeprefix(prefix): leaf for path, leaf in params.items() if path.startswith(prefix)}

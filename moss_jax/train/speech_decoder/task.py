"""Flow and vocoder as tasks of the loop; see `moss_jax.train.task`. Parameters lie whole on every device, the rows of a
batch are divided; random draws come from (seed, step)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from moss_jax.speech_decoder.flow.model import FlowModel, flow_shapes
from moss_jax.speech_decoder.vocoder import HiFT, vocoder_shapes
from moss_jax.train.feed import ClipFeed
from moss_jax.train.preemption import Preemption
from moss_jax.train.run_folder import resolve_init
from moss_jax.train.speech_decoder.discriminators import Discriminators
from moss_jax.train.speech_decoder.export import export_parts
from moss_jax.train.speech_decoder.flops import flow_flops, vocoder_flops
from moss_jax.train.speech_decoder.flow import FlowObjective, centred, draw, squared_error, velocity
from moss_jax.train.speech_decoder.run import FlowRun, SpeechDecoderRun, VocoderRun
from moss_jax.train.speech_decoder.vocoder import cast, losses, mel_distance, render
from moss_jax.train.state import TrainState, new_state, shardings_of, updated
from moss_jax.train.task import Batch, Flat, Step, check_rows, scalars

RANDOM = "random"
# in front of the paths of a vocoder's run
VOCODER = "vocoder/"
JUDGES = "judges/"


class SpeechDecoderTask:
    """What both tasks share.

    Args:
        mesh: where everything lies. say: gets lines for people.

    Raises:
        MossError: a batch does not divide over the mesh, or there is nothing that says how large the model is.
    """

    def __init__(self, run: SpeechDecoderRun, mesh: Mesh, say: Say):
        check_rows(run.batch_size, mesh)
        self._run = run
        self._mesh = mesh
        self._say = say
        self.frozen = {}
        self._everywhere = NamedSharding(mesh, P())
        self.config = self._sizes()
        if run.system is not None and not Path(resolve_init(run.system)).is_dir():
            raise MossError(f"{run.system}: no such folder, expected the system that an export is completed from")

    def _sizes(self) -> SpeechDecoderConfig:
        run = self._run
        found = None
        if run.init != RANDOM:
            found = SystemFolder(resolve_init(run.init)).config(SPEECH_DECODER)
        elif run.model is None:
            found = SystemFolder(resolve_init(run.system)).config(SPEECH_DECODER)
        if run.model is None:
            return found
        if found is not None and self._trained(found) != self._trained(run.model):
            raise MossError(f"{run.init}: its speech decoder is of other sizes than the run's model")
        return run.model

    def _loaded(self, stem: str, shapes: Mapping[str, Any]) -> Flat:
        path = Path(resolve_init(self._run.init)) / "speech_decoder" / f"{stem}.safetensors"
        return flatten(load_tree(path, shapes, self._everywhere, jnp.float32))

    def state_shardings(self) -> TrainState:
        state = jax.eval_shape(self.new_state, self._shapes())
        return shardings_of(state, {path: self._everywhere for path in state.params}, self._mesh)

    def new_state(self, parameters: Flat) -> TrainState:
        average = {path: jnp.copy(leaf) for path, leaf in parameters.items()} if self._run.average else ()
        return new_state(parameters, self._run.optimizer, average)

    def feed(self) -> ClipFeed:
        return self._feed(self._run.data, self._run.workers)

    def _feed(self, mixture: Mixture, workers: int) -> ClipFeed:
        def open_part(index: int, count: int) -> DecoderBatches:
            return DecoderBatches(
                mixture,
                self.config,
                batch_size=self._run.batch_size,
                process_index=index,
                process_count=count,
                workers=workers,
                **self._length(),
            )

        return ClipFeed(self._run.batch_size, self._mesh, open_part)

    def make_step(self) -> Step:
        run = self._run

        def step(state: TrainState, frozen: Flat, batch: Batch, limit):
            key = jax.random.fold_in(jax.random.key(run.seed), state.step)
            gradient = jax.value_and_grad(self._loss, has_aux=True)
            (loss, terms), grads = gradient(state.params, batch, key, state.step)
            average = state.extra
            if run.average:  # it starts fast, so that it forgets the first weights
                decay = jnp.minimum(run.average, (1 + state.step) / (10 + state.step)).astype(jnp.float32)
                average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.extra, state.params)
            state, metrics = updated(state, grads, loss, limit, run.optimizer, average)
            return state, metrics | terms | {"loss": loss}

        return jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings(), self._everywhere))

    def evaluation(self) -> Callable[[TrainState, Preemption], dict[str, Any] | None] | None:
        run = self._run
        if run.held_out is None:
            return None
        feed = self._feed(run.held_out, 0)
        measure = jax.jit(self._measured, out_shardings=self._everywhere)

        def evaluate(state: TrainState, preemption: Preemption) -> dict[str, Any] | None:
            feed.skip_to(0)
            found = []
            try:
                for index in range(run.evaluate_batches):
                    if preemption.asked:
                        return None
                    key = jax.random.fold_in(jax.random.key(run.seed + 1), index)
                    found.append(jax.device_get(measure(self._best(state), next(feed), key)))
            finally:
                feed.close()
            return {name: float(np.mean([entry[name] for entry in found])) for name in found[0]}

        return evaluate

    def _best(self, state: TrainState) -> Flat:
        """The parameters that are measured and exported."""
        return state.extra if self._run.average else state.params

    def described(self) -> dict[str, dict[str, Any]]:
        return {
            "architecture": write_config(self._trained(self.config)),
            "objective": write_config(self._run.objective),
        }

    def entry(self, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return scalars(metrics)


class FlowTask(SpeechDecoderTask):
    """The task of a `FlowRun`."""

    what = "flow"

    def __init__(self, run: FlowRun, mesh: Mesh, say: Say):
        super().__init__(run, mesh, say)
        self.rows = f"{run.batch_size} x {run.codes} codes"

    @staticmethod
    def _trained(config: SpeechDecoderConfig):
        return config.flow

    def _shapes(self):
        return flow_shapes(self.config.flow)

    def _length(self) -> dict[str, int]:
        return {"codes": self._run.codes}

    def start(self) -> Flat:
        run = self._run
        config = self.config.flow
        if run.init != RANDOM:
            return self._loaded(flow_stem(), flow_shapes(config))
        params = jax.jit(lambda key: flatten(nn.unbox(FlowModel(config).init(key))["params"]))(jax.random.key(run.seed))
        about = [DecoderDataset(folder, self.config, True).about for _, folder, _ in run.data.sources]
        mean = np.average([entry["mel_mean"] for entry in about], 0, [weight for *_, weight in run.data.sources])
        return jax.device_put(centred(params, config, mean), self._everywhere)

    def _errors(self, params: Flat, batch: Batch, drawn: Mapping[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of each item the errors of the velocity and of the encoder's mel, summed over its frames, and how many
        frames it has: float32 [B] each."""
        dtype = jnp.dtype(self._run.dtype)
        nested = unflatten({path: leaf.astype(dtype) for path, leaf in params.items()})
        config = self.config.flow
        said, right, encoded, valid = velocity(nested, config, batch, drawn, self._run.objective.sigma, dtype)
        prior = squared_error(encoded, config.normalized(batch["mel"]), valid)
        return squared_error(said, right, valid), prior, valid.sum(1).astype(jnp.float32)

    def _loss(self, params: Flat, batch: Batch, key: jax.Array, step: jax.Array):
        codes = batch["codes"].shape[1]
        drawn = draw(key, self._run.objective, self.config.flow, batch["count"], codes)
        errors, priors, frames = self._errors(params, batch, drawn)
        masked = drawn["chunk"] < codes
        prior = _mean(priors, frames)
        terms = {"prior_loss": prior}
        for name, chosen in (("offline", ~masked), ("stream", masked)):
            terms[f"{name}_loss"] = _mean(errors, frames, chosen)
            terms[f"{name}_count"] = jnp.where(chosen, frames, 0).sum()
        return _mean(errors, frames) + self._run.objective.prior * prior, terms

    def _measured(self, params: Flat, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """With all conditions: the error offline and as a stream has it, and the mean of the two."""
        config = self.config.flow
        codes = batch["codes"].shape[1]
        objective = FlowObjective(drop=0.0, prompt=0.0, chunks=(0,), sigma=self._run.objective.sigma)
        drawn = draw(key, objective, config, batch["count"], codes)
        stream = drawn | {"chunk": jnp.full_like(drawn["chunk"], config.chunk)}
        found = {}
        for name, given in (("offline", drawn), ("stream", stream)):
            errors, priors, frames = self._errors(params, batch, given)
            found[f"{name}_loss"] = _mean(errors, frames)
            found["prior_loss"] = _mean(priors, frames)
        return {"loss": (found["offline_loss"] + found["stream_loss"]) / 2, **found}

    def tokens(self, batch: Batch) -> int:
        return self._run.batch_size * self._run.codes * self.config.flow.frames_per_code

    def flops(self, batch: Batch) -> float:
        return flow_flops(self.config.flow, self._run.batch_size * self._run.codes)

    def export(self, state: TrainState, folder: Path, dtype: str | None = None) -> None:
        """One set of weights, under the name of every chunk size that the config has."""
        best = self._best(state)
        mine = self.config
        parts = {flow_stem(chunk): best for chunk in (None, *mine.chunks)}

        def merged(there: SpeechDecoderConfig) -> SpeechDecoderConfig:
            return replace(there, flow=mine.flow, speaker=mine.speaker, chunks=mine.chunks)

        export_parts(self._run, mine, merged, "flow*", parts, folder, dtype, self._say)


def _mean(errors: jax.Array, frames: jax.Array, chosen: jax.Array | bool = True) -> jax.Array:
    return jnp.where(chosen, errors, 0).sum() / jnp.maximum(jnp.where(chosen, frames, 0).sum(), 1)


class VocoderTask(SpeechDecoderTask):
    """The task of a `VocoderRun`."""

    what = "vocoder"

    def __init__(self, run: VocoderRun, mesh: Mesh, say: Say):
        super().__init__(run, mesh, say)
        self.config = replace(self.config, vocoder=replace(self.config.vocoder, weight_norm=True))
        least = run.objective.shortest(self.config.vocoder)
        if run.frames < least:
            raise MossError(f"run: frames is {run.frames}, expected {least} at least for its resolutions")
        self.rows = f"{run.batch_size} x {run.frames} frames"

    @staticmethod
    def _trained(config: SpeechDecoderConfig):
        return config.vocoder

    def _length(self) -> dict[str, int]:
        return {"frames": self._run.frames}

    def _shapes(self):
        shapes = {VOCODER + path: leaf for path, leaf in vocoder_shapes(self.config.vocoder).items()}
        if self._run.objective.discriminators is not None:
            shapes |= jax.eval_shape(self._new_judges, jax.random.key(0))
        return shapes

    def start(self) -> Flat:
        run = self._run
        config = self.config.vocoder
        keys = jax.random.split(jax.random.key(run.seed))
        if run.init != RANDOM:
            params = self._loaded("vocoder", vocoder_shapes(config))
        else:

            def new(key):
                mel = jnp.zeros((1, 4, config.mel_bins))
                noise = jnp.zeros((1, 4 * config.hop, config.harmonics))
                return flatten(nn.unbox(HiFT(config).init(key, mel, noise))["params"])

            params = jax.jit(new)(keys[0])
        params = {VOCODER + path: leaf for path, leaf in params.items()}
        if run.objective.discriminators is not None:
            params |= jax.jit(self._new_judges)(keys[1])
        return jax.device_put(params, self._everywhere)

    def _new_judges(self, key: jax.Array) -> Flat:
        wave = jnp.zeros((1, self._run.frames * self.config.vocoder.hop))
        params = flatten(nn.unbox(Discriminators(self._run.objective.discriminators).init(key, wave))["params"])
        return {JUDGES + path: leaf for path, leaf in params.items()}

    def _nested(self, params: Flat):
        mine = {path.removeprefix(VOCODER): leaf for path, leaf in params.items() if path.startswith(VOCODER)}
        judges = {path.removeprefix(JUDGES): leaf for path, leaf in params.items() if path.startswith(JUDGES)}
        return unflatten(cast(mine, jnp.dtype(self._run.dtype))), unflatten(judges)

    def _loss(self, params: Flat, batch: Batch, key: jax.Array, step: jax.Array):
        mine, judges = self._nested(params)
        run = self._run
        return losses(mine, judges, self.config.vocoder, run.objective, batch, key, step, jnp.dtype(run.dtype))

    def _measured(self, params: Flat, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        mine, _ = self._nested(params)
        run = self._run
        config = self.config.vocoder
        objective = replace(run.objective, true_f0=0.0, discriminators=None)
        loss, terms = losses(mine, None, config, objective, batch, key, jnp.int32(0), jnp.dtype(run.dtype))
        made, _ = render(mine, config, batch, key, 0.0, jnp.dtype(run.dtype))
        return {"loss": loss, **terms, "mel_distance": mel_distance(made, batch["wave"], config)}

    def tokens(self, batch: Batch) -> int:
        return self._run.batch_size * self._run.frames

    def flops(self, batch: Batch) -> float:
        return vocoder_flops(self.config.vocoder, self.tokens(batch))

    def export(self, state: TrainState, folder: Path, dtype: str | None = None) -> None:
        best = self._best(state)
        mine = self.config
        parts = {path.removeprefix(VOCODER): leaf for path, leaf in best.items() if path.startswith(VOCODER)}

        def merged(there: SpeechDecoderConfig) -> SpeechDecoderConfig:
            overlap = {"mel_overlap": mine.mel_overlap, "mel_context": mine.mel_context}
            return replace(there, vocoder=mine.vocoder, **overlap)

        export_parts(self._run, mine, merged, "vocoder", {"vocoder": parts}, folder, dtype, self._say)

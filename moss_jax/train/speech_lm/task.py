"""The language model as a task of the loop: frozen stages, both losses, packed sequences; see `moss_jax.train.task`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moss_jax.checkpoint.config_io import write_config
from moss_jax.progress import Say
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.train.feed import Feed
from moss_jax.train.metrics import by_source
from moss_jax.train.speech_lm.evaluation import Evaluation
from moss_jax.train.speech_lm.export_system import export_system
from moss_jax.train.speech_lm.feed import packed_feed
from moss_jax.train.speech_lm.flops import step_flops
from moss_jax.train.speech_lm.initial import starting_parameters
from moss_jax.train.speech_lm.run import Run
from moss_jax.train.speech_lm.step import make_step, state_shardings, unrolled
from moss_jax.train.state import TrainState, new_state
from moss_jax.train.task import Batch, Evaluate, Flat, Step, check_rows, scalars

COMPUTE = ("attention", "remat", "dtype", "param_dtype")  # fields of the config that are not part of the architecture


def prepare(run: Run, mesh: Mesh, say: Say) -> tuple["LanguageModelTask", Flat]:
    """Loads the parameters that a run starts from; see `moss_jax.train.tasks.prepare`."""
    check_rows(run.batch_size, mesh, run.accumulate)
    config, trainable, frozen = starting_parameters(run, mesh)
    return LanguageModelTask(run, config, frozen, mesh, say), trainable


class LanguageModelTask:
    """The task of a `Run`.

    Args:
        config: of the model.
        frozen: the flat parameters that the stage does not train.
        mesh: where all arrays are placed.
        say: receives progress lines.
    """

    def __init__(self, run: Run, config: SpeechLMConfig, frozen: Flat, mesh: Mesh, say: Say):
        self.config = config
        self.frozen = frozen
        self.description = f"stage {run.stage.name}"
        self.batch_description = f"{run.batch_size} x {run.context} rows"
        self._run = run
        self._mesh = mesh
        self._say = say
        self._sources = [name for name, *_ in run.data.sources]
        self._flops = step_flops(config, run.stage, run.batch_size * run.context, run.context)

    def state_shardings(self) -> TrainState:
        return state_shardings(self.config, self._run.stage, self._run.optimizer, self._mesh)

    def feed(self) -> Feed:
        return packed_feed(self._run.data, self.config, self._run, self._mesh, self._run.workers)

    def new_state(self, parameters: Flat) -> TrainState:
        return new_state(parameters, self._run.optimizer)

    def make_step(self) -> Step:
        run = self._run
        return make_step(
            self.config,
            run.stage,
            run.optimizer,
            accumulate=run.accumulate,
            sources=len(self._sources),
            mesh=self._mesh,
            unroll=unrolled(self.config),
        )

    def evaluation(self) -> Evaluate | None:
        if self._run.held_out is None:
            return None
        held_out = Evaluation(self._run, self._run.held_out, self.config, self._mesh)
        return lambda state, preemption: held_out.measure(state.params, self.frozen, preemption)

    def compatibility(self) -> dict[str, dict[str, Any]]:
        architecture = {name: value for name, value in write_config(self.config).items() if name not in COMPUTE}
        return {"architecture": architecture, "stage": write_config(self._run.stage)}

    def tokens(self, batch: Batch) -> int:
        return self._run.batch_size * self._run.context

    def flops(self, batch: Batch) -> float:
        return self._flops

    def log_entry(self, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return scalars(metrics) | {"sources": by_source(metrics, self._sources)}

    def export(self, state: TrainState, folder: Path, dtype: str | None = None) -> None:
        export_system(self._run, self.config, state.params, self.frozen, folder, self._say, dtype)

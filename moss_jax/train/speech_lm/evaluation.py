"""The loss on held-out data: always the same batches, so that two evaluations of a run can be compared."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.train.feed import Feed
from moss_jax.train.metrics import by_source
from moss_jax.train.preemption import Preemption
from moss_jax.train.run import Run
from moss_jax.train.speech_lm.step import make_eval_step


class Evaluation:
    """The first `evaluate_batches` batches of `held_out`, of the size that the run trains with."""

    def __init__(self, run: Run, config: SpeechLMConfig, mesh: Mesh):
        self._run = run
        self._config = config
        self._feed = Feed(run.held_out, config, run, mesh)
        step = make_eval_step(config, run.stage, sources=len(self._feed.source_names))
        self._step = jax.jit(step, out_shardings=NamedSharding(mesh, P()))

    def measure(
        self, trainable: dict[str, jax.Array], frozen: dict[str, jax.Array], preemption: Preemption
    ) -> dict[str, Any] | None:
        """{"loss", "text_loss", "audio_loss", "sources"}; None when a notice to end came meanwhile.

        The loss of a target that the data does not have is left out.
        """
        run = self._run
        totals = {}
        self._feed.skip_to(0)
        try:
            for _ in range(run.evaluate_batches):
                if preemption.asked:
                    return None
                metrics = jax.device_get(self._step(trainable, frozen, next(self._feed)))
                for name in metrics:
                    if name.startswith("source_"):
                        totals[name] = totals.get(name, 0) + np.asarray(metrics[name], np.float64)
        finally:
            self._feed.close()
        losses = {}
        for name in (channel.name for channel in self._config.channels):
            count = totals[f"source_{name}_count"].sum()
            if count:
                losses[f"{name}_loss"] = float(totals[f"source_{name}_sum"].sum() / count)
        loss = sum((run.loss_weights[name] * value for name, value in losses.items()), 0.0)
        return {"loss": loss, **losses, "sources": by_source(totals, self._feed.source_names)}

"""The loss on held-out data: always on the same batches, so that evaluations of a run are comparable."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_jax.data import Mixture
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.train.metrics import by_source
from moss_jax.train.preemption import Preemption
from moss_jax.train.speech_lm.feed import packed_feed
from moss_jax.train.speech_lm.run import Run
from moss_jax.train.speech_lm.step import make_eval_step


class Evaluation:
    """Measures the loss on the first `evaluate_batches` batches of `held_out`, with the batch size of training."""

    def __init__(self, run: Run, held_out: Mixture, config: SpeechLMConfig, mesh: Mesh):
        self._run = run
        self._config = config
        self._sources = [name for name, *_ in held_out.sources]
        self._feed = packed_feed(held_out, config, run, mesh)
        step = make_eval_step(config, run.stage, sources=len(self._sources))
        self._step = jax.jit(step, out_shardings=NamedSharding(mesh, P()))

    def measure(
        self, trainable: dict[str, jax.Array], frozen: dict[str, jax.Array], preemption: Preemption
    ) -> dict[str, Any] | None:
        """{"loss", "text_loss", "audio_loss", "sources"}; None if the run is asked to stop meanwhile.

        The loss of a channel without targets in the data is left out.
        """
        run = self._run
        totals: dict[str, np.ndarray] = {}
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
        return {"loss": loss, **losses, "sources": by_source(totals, self._sources)}

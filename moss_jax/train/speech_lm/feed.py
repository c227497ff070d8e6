"""The packed batches of a mixture, on the mesh."""

from jax.sharding import Mesh, NamedSharding

from moss_jax.data import Mixture, open_batches
from moss_jax.data.batches import StepBatches
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.train.feed import Feed, row_spans
from moss_jax.train.speech_lm.run import Run
from moss_jax.train.speech_lm.step import batch_shardings


def packed_feed(mixture: Mixture, config: SpeechLMConfig, run: Run, mesh: Mesh, workers: int = 0) -> Feed:
    """Batches of the run's size from a mixture: its training data, or its held-out data.

    Args:
        workers: processes that read and pack ahead; 0: threads.
    """
    shape = (run.batch_size, run.context)
    shardings = batch_shardings(mesh, shape)

    def open_part(index: int, count: int) -> StepBatches:
        return open_batches(
            mixture,
            config,
            context=run.context,
            batch_size=run.batch_size,
            process_index=index,
            process_count=count,
            workers=workers,
        )

    def sharding_of(name: str, shape: tuple[int, ...]) -> NamedSharding:
        return shardings[name]

    return Feed(run.batch_size, row_spans(shardings["positions"], shape), open_part, sharding_of)

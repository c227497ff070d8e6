"""An endless iterator over batches that are a function of the step, read through Grain. Each kind of data has its own
subclass."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moss_jax.documents import parse_object
from moss_jax.errors import MossError

if TYPE_CHECKING:
    import grain

# Without worker processes: threads that prepare batches while the device computes, and batches prepared ahead.
GRAIN_READ_THREADS = 2
GRAIN_READ_AHEAD = 4
WORKER_READ_AHEAD = 2  # batches prepared ahead by each worker process


class StepBatches:
    """An endless iterator over dictionaries of arrays that can continue from any step.

    Args:
        batches: element s is this process's share of the global batch of step s.
        fingerprint: of everything that the order of data depends on, except the step.
        fingerprint_of: what `fingerprint` depends on, for error messages: "data, seed, ...".
        workers: processes that read ahead; 0: threads of this process.

    Attributes:
        step: of the next global batch.
    """

    def __init__(self, batches: "grain.MapDataset", fingerprint: str, fingerprint_of: str, workers: int = 0):
        self.step = 0
        self._batches = batches
        self._fingerprint = fingerprint
        self._fingerprint_of = fingerprint_of
        self._workers = workers
        self._iterator: Any = None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """This process's share of the global batch of `step`.

        Raises:
            MossError: the data cannot be read any more.
        """
        if self._iterator is None:
            self._iterator = iter(self._dataset_from(self.step))
        batch = next(self._iterator)
        self.step += 1
        return batch

    def _dataset_from(self, step: int) -> "grain.IterDataset":
        import grain

        if not self._workers:
            return self._batches[step:].to_iter_dataset(grain.ReadOptions(GRAIN_READ_THREADS, GRAIN_READ_AHEAD))
        mark_flags_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=WORKER_READ_AHEAD)
        return self._batches[step:].to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(options)

    def get_state(self) -> str:
        """The position of the iterator as JSON, the same in every process."""
        return json.dumps({"step": self.step, "fingerprint": self._fingerprint})

    def set_state(self, state: str | bytes) -> None:
        """Continues from the position where `get_state` was called, with any number of processes and workers.

        Raises:
            MossError: `state` is not a state, or belongs to other data.
        """
        try:
            values = parse_object(state)
            step = int(values["step"])
            fingerprint = values["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise MossError(f"invalid data state {state!r:.60}; expected the value returned by get_state()") from error
        if fingerprint != self._fingerprint:
            raise MossError(
                f"data: the saved position belongs to other {self._fingerprint_of}, expected a position in the data of "
                "this run"
            )
        self.skip_to(step)

    def skip_to(self, step: int) -> None:
        """Continues with the global batch of `step`, at no cost for any distance."""
        if step < 0:
            raise MossError(f"data: step {step}, expected 0 or more")
        self.close()
        self.step = step

    def close(self) -> None:
        """Ends worker processes and reading threads; the next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def mark_flags_as_parsed() -> None:
    """Grain's worker processes read absl flags, which a program without absl.app never parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

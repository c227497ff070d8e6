"""An iterator over batches that are a function of the step, read through Grain. The rooms that train have one each."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from moss_jax.documents import parse_object
from moss_jax.errors import MossError

# batches that are prepared while the device computes
READ_THREADS = 2
READ_AHEAD = 4


class StepBatches:
    """Dictionaries of arrays, without end; any step can be the next one.

    Args:
        batches: a grain.MapDataset; element s is this process's part of the global batch of step s.
        fingerprint: of everything that the order of data depends on but the step.
        what: that makes it, for people: "data, seed, ...".
        workers: processes that read ahead; 0: threads of this one.

    Attributes:
        step: of the global batch that comes next.
    """

    def __init__(self, batches: Any, fingerprint: str, what: str, workers: int = 0):
        self.step = 0
        self._batches = batches
        self._fingerprint = fingerprint
        self._what = what
        self._workers = workers
        self._iterator = None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """This process's part of the global batch of `step`.

        Raises:
            MossError: what the batch is made of cannot be read any more.
        """
        if self._iterator is None:
            self._iterator = iter(self._from(self.step))
        batch = next(self._iterator)
        self.step += 1
        return batch

    def _from(self, step: int) -> Any:
        import grain

        if not self._workers:
            return self._batches[step:].to_iter_dataset(grain.ReadOptions(READ_THREADS, READ_AHEAD))
        mark_flags_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
        return self._batches[step:].to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(options)

    def get_state(self) -> str:
        """Where the iterator stands, JSON; the same in every process."""
        return json.dumps({"step": self.step, "fingerprint": self._fingerprint})

    def set_state(self, state: str | bytes) -> None:
        """Goes where `get_state` was called, with any number of processes and workers.

        Raises:
            MossError: it is not a state, or one of other data.
        """
        try:
            state = parse_object(state)
            step = int(state["step"])
            fingerprint = state["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise MossError(f"data state: {state!r:.60} is none, expected what get_state gave") from error
        if fingerprint != self._fingerprint:
            raise MossError(
                f"data: the saved position belongs to other {self._what}, expected a position in the data of this run"
            )
        self.skip_to(step)

    def skip_to(self, step: int) -> None:
        """The global batch of `step` comes next; costs nothing, whatever the distance."""
        if step < 0:
            raise MossError(f"data: step {step}, expected 0 or more")
        self.close()
        self.step = step

    def close(self) -> None:
        """Ends worker processes; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def mark_flags_as_parsed() -> None:
    """Grain's worker processes ask for absl flags, which a program without absl.app never parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

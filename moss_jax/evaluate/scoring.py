"""Log-likelihoods under the language model, in batches with few different compiled shapes.

A batch has a fixed size and a length from a short list. Shorter sequences are padded on the right, which has no effect
in a causal model. Logits are computed for LOGIT_ROWS rows at a time, so that no array [B, T, V] exists.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from moss_jax.errors import MossError
from moss_jax.sharding import fitting
from moss_jax.speech_lm import LayerSplitModel, SpeechLMConfig

MIN_LENGTH = 64  # rows; lengths are 1 and 1.5 times the powers of two from this one
LOGIT_ROWS = 32  # divides every length


@dataclass(frozen=True, eq=False)
class Passage:
    """A sequence of which some rows are scored: rows int [T, 2], scored bool [T]; the first row cannot be scored."""

    rows: np.ndarray
    scored: np.ndarray


@partial(jax.jit, static_argnames=("config", "branches"))
def log_likelihoods(
    params: Any, grid: jax.Array, scored: jax.Array, *, config: SpeechLMConfig, branches: tuple[str, ...]
) -> jax.Array:
    """Sum of log p(row | previous rows) over the scored rows, each in the channel that its content is in.

    Args:
        params: nested parameters of LayerSplitModel.
        grid: int32 [B, T, 2], T a multiple of LOGIT_ROWS; padded on the right.
        scored: bool [B, T].
        branches: the branches, "text" and "audio", that are computed; scored rows of another channel add 0.

    Returns:
        float32 [B].
    """
    call, h, positions = _shared(params, grid, config)
    target = jnp.roll(grid, -1, 1)
    scored_target = jnp.roll(scored, -1, 1).at[:, -1].set(False)
    spoken = target[..., 0] == config.modality_pad_id
    total = jnp.zeros(grid.shape[0], jnp.float32)
    for index, channel in enumerate(config.channels):
        if channel.name not in branches:
            continue
        y = call(channel.name, h, positions, method="block")
        weights = (scored_target & (spoken == bool(index))).astype(jnp.float32)

        def log_likelihood(inputs: tuple[jax.Array, jax.Array, jax.Array], name: str = channel.name) -> jax.Array:
            y, ids, weights = inputs
            logits = call(name, y, method="logits")
            chosen = jnp.take_along_axis(logits, ids[..., None], -1)[..., 0]
            return ((chosen - jax.nn.logsumexp(logits, -1)) * weights).sum(-1)

        total += jax.lax.map(log_likelihood, tuple(_in_chunks(x) for x in (y, target[..., index], weights))).sum(0)
    return total


@partial(jax.jit, static_argnames="config")
def next_log_probabilities(
    params: Any, grid: jax.Array, lengths: jax.Array, candidates: jax.Array, *, config: SpeechLMConfig
) -> jax.Array:
    """log p of candidate text ids as the next row.

    Args:
        params: nested parameters of LayerSplitModel.
        grid: int32 [B, T, 2], padded on the right.
        lengths: int32 [B], rows without padding.
        candidates: int32 [B, K], text ids.

    Returns:
        float32 [B, K].
    """
    call, h, positions = _shared(params, grid, config)
    y = call("text", h, positions, method="block")
    last = jnp.take_along_axis(y, (lengths - 1)[:, None, None], 1)  # [B, 1, D]
    logits = call("text", last, method="logits")[:, 0]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), candidates, -1)


def _shared(params: Any, grid: jax.Array, config: SpeechLMConfig) -> tuple[Callable[..., Any], jax.Array, jax.Array]:
    """The model's `apply`, the output of the shared block [B, T, D], and the positions [B, T]."""
    call: Callable[..., Any] = partial(LayerSplitModel(config).apply, {"params": params})
    positions = jnp.broadcast_to(jnp.arange(grid.shape[1]), grid.shape[:2])
    h: jax.Array = call(grid, method="embed")
    if config.num_shared_layers:
        h = call("shared", h, positions, method="block")
    return call, h, positions


def _in_chunks(x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [T / LOGIT_ROWS, B, LOGIT_ROWS, ...]."""
    return rearrange(x, "b (chunks rows) ... -> chunks b rows ...", rows=LOGIT_ROWS)


def padded_length(length: int) -> int:
    """The smallest of the compiled lengths that holds `length` rows."""
    size = MIN_LENGTH
    while size < length:
        is_power_of_two = size & (size - 1) == 0
        size = size * 3 // 2 if is_power_of_two else size // 3 * 4
    return size


class Scorer:
    """Scores passages with one model.

    Args:
        config, params: of LayerSplitModel; params are nested.
        mesh: of the devices that hold the parameters; the batch is divided over its axes "data" and "fsdp".
        batch_size: passages in a batch, rounded up to a multiple of the devices that divide it.
    """

    def __init__(
        self, config: SpeechLMConfig, params: Any, mesh: jax.sharding.Mesh | None = None, batch_size: int = 8
    ) -> None:
        if batch_size < 1:
            raise MossError(f"batch size is {batch_size}, expected at least 1")
        self.config = config
        self.params = params
        self.mesh = mesh
        shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // shards) * shards

    def check(self, length: int, name: str) -> None:
        """Raises MossError if `length` rows are more than the model has positions; `name` is for the message."""
        limit = self.config.max_position_embeddings
        if length > limit:
            raise MossError(f"{name}: has {length} rows, expected at most the model's {limit}")

    def likelihoods(self, groups: Sequence[Sequence[Passage]]) -> Iterator[list[tuple[int, list[float]]]]:
        """Log-likelihoods of groups of passages, such as the endings of a story.

        Yields:
            After each batch the groups that it completed: (index of the group, log-likelihood of each passage).
        """
        # Batches contain passages of one padded length that need the same branches.
        plans: dict[tuple[int, tuple[str, ...]], list[tuple[int, int]]] = {}
        for index, group in enumerate(groups):
            size = padded_length(max(len(passage.rows) for passage in group))
            spoken = np.concatenate([p.rows[p.scored, 0] == self.config.modality_pad_id for p in group])
            branches: tuple[str, ...] = ()
            if not spoken.all():
                branches += ("text",)
            if spoken.any():
                branches += ("audio",)
            plans.setdefault((size, branches), []).extend((index, position) for position in range(len(group)))
        scores: dict[int, dict[int, float]] = {}  # of groups that are not complete
        for (size, branches), places in sorted(plans.items()):
            for first in range(0, len(places), self.batch_size):
                part = places[first : first + self.batch_size]
                passages = [groups[index][position] for index, position in part]
                grid = self._grid([p.rows for p in passages], size)
                scored = np.zeros((self.batch_size, size), bool)
                for row, passage in enumerate(passages):
                    scored[row, 1 : len(passage.rows)] = passage.scored[1:]
                with self._on_mesh():
                    inputs = self._placed(grid, scored)
                    sums = log_likelihoods(self.params, *inputs, config=self.config, branches=branches)
                complete = []
                for (index, position), value in zip(part, np.asarray(sums), strict=False):
                    values = scores.setdefault(index, {})
                    values[position] = float(value)
                    if len(values) == len(groups[index]):
                        del scores[index]
                        complete.append((index, [values[i] for i in range(len(values))]))
                yield complete

    def choices(
        self, prompts: Sequence[np.ndarray], candidates: Sequence[Sequence[int]]
    ) -> Iterator[list[tuple[int, list[float]]]]:
        """log p of candidate text ids as the next row after each prompt [T, 2].

        Yields:
            After each batch: (index of the prompt, log p of each candidate).
        """
        width = max(map(len, candidates), default=1)
        plans: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            plans.setdefault(padded_length(len(prompt)), []).append(index)
        for size, members in sorted(plans.items()):
            for first in range(0, len(members), self.batch_size):
                part = members[first : first + self.batch_size]
                lengths = np.ones(self.batch_size, np.int32)
                ids = np.zeros((self.batch_size, width), np.int32)
                for row, index in enumerate(part):
                    lengths[row] = len(prompts[index])
                    ids[row, : len(candidates[index])] = candidates[index]
                grid = self._grid([prompts[index] for index in part], size)
                with self._on_mesh():
                    inputs = self._placed(grid, lengths, ids)
                    values = np.asarray(next_log_probabilities(self.params, *inputs, config=self.config))
                yield [(i, values[row, : len(candidates[i])].tolist()) for row, i in enumerate(part)]

    def apply(self, function: Callable[..., Any], rows: Sequence[np.ndarray], size: int) -> Any:
        """`function(params, grid)` for one batch of sequences [T, 2], padded on the right to `size` rows."""
        with self._on_mesh():
            return function(self.params, *self._placed(self._grid(rows, size)))

    def _grid(self, rows: Sequence[np.ndarray], size: int) -> np.ndarray:
        grid = np.empty((self.batch_size, size, 2), np.int32)
        grid[:] = self.config.endoftext_id, self.config.audio_pad_id
        for index, sequence in enumerate(rows):
            grid[index, : len(sequence)] = sequence
        return grid

    def _placed(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        """The arrays on the devices of the mesh, divided over the batch."""
        if self.mesh is None:
            return arrays
        axes = [("batch", *(None,) * (x.ndim - 1)) for x in arrays]
        return tuple(jax.device_put(x, fitting(a, x.shape, self.mesh)) for x, a in zip(arrays, axes, strict=True))

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

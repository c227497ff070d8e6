"""Log-likelihoods under the language model, in batches of few compiled shapes.

A call has a fixed number of rows and a length out of a short list; what is too short is padded on the right, which no
causal row sees. Logits are made for a stretch of rows at a time, so that no array [batch, length, vocabulary] exists.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.errors import MossError
from moss_jax.sharding import fitting
from moss_jax.speech_lm import LayerSplitModel, SpeechLMConfig

SMALLEST = 64  # rows; lengths are 1 and 1.5 times the powers of two from here
STRETCH = 32  # rows of which logits are made at a time; divides every length


@dataclass(frozen=True, eq=False)
class Passage:
    """Rows of which some are scored: rows int [N, 2], scored bool [N]; the first row cannot be."""

    rows: np.ndarray
    scored: np.ndarray


@partial(jax.jit, static_argnames=("config", "branches"))
def log_likelihoods(
    params: Any, grid: jax.Array, scored: jax.Array, *, config: SpeechLMConfig, branches: tuple[str, ...]
) -> jax.Array:
    """Sum of log p(row | rows before it) over the scored rows, each in its own channel.

    Args:
        params: nested.
        grid: int32 [B, T, 2], T a multiple of STRETCH; padded on the right.
        scored: bool [B, T].
        branches: which of "text" and "audio" scored rows need; the others' rows count nothing.

    Returns:
        float32 [B].
    """
    call, h, positions = _shared(params, grid, config)
    target = jnp.roll(grid, -1, 1)
    wanted = jnp.roll(scored, -1, 1).at[:, -1].set(False)
    spoken = target[..., 0] == config.modality_pad_id
    total = jnp.zeros(grid.shape[0], jnp.float32)
    for index, channel in enumerate(config.channels):
        if channel.name not in branches:
            continue
        y = call(channel.name, h, positions, method="block")
        weights = (wanted & (spoken == bool(index))).astype(jnp.float32)

        def stretch(part, name=channel.name):
            y, ids, weights = part
            logits = call(name, y, method="logits")
            own = jnp.take_along_axis(logits, ids[..., None], -1)[..., 0]
            return ((own - jax.nn.logsumexp(logits, -1)) * weights).sum(-1)

        total += jax.lax.map(stretch, tuple(_stretches(x) for x in (y, target[..., index], weights))).sum(0)
    return total


@partial(jax.jit, static_argnames="config")
def next_log_probabilities(
    params: Any, grid: jax.Array, lengths: jax.Array, candidates: jax.Array, *, config: SpeechLMConfig
) -> jax.Array:
    """log p of some text ids as the next row: grid [B, T, 2], lengths [B], candidates [B, K] -> float32 [B, K]."""
    call, h, positions = _shared(params, grid, config)
    y = call("text", h, positions, method="block")
    last = jnp.take_along_axis(y, (lengths - 1)[:, None, None], 1)  # [B, 1, D]
    logits = call("text", last, method="logits")[:, 0]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), candidates, -1)


def _shared(params, grid, config):
    call = partial(LayerSplitModel(config).apply, {"params": params})
    positions = jnp.broadcast_to(jnp.arange(grid.shape[1]), grid.shape[:2])
    h = call(grid, method="embed")
    if config.num_shared_layers:
        h = call("shared", h, positions, method="block")
    return call, h, positions


def _stretches(x):
    """[B, T, ...] -> [T / STRETCH, B, STRETCH, ...]."""
    return x.reshape(x.shape[0], -1, STRETCH, *x.shape[2:]).swapaxes(0, 1)


def padded_length(length: int) -> int:
    """The compiled length for this many rows."""
    size = SMALLEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


class Scorer:
    """Scores passages with one model.

    Args:
        config, params: of LayerSplitModel; params are nested.
        mesh: the devices that params lie on; the batch is divided over its axes "data" and "fsdp".
        batch_size: passages in a call, rounded up to what the mesh divides.
    """

    def __init__(self, config: SpeechLMConfig, params: Any, mesh: jax.sharding.Mesh | None = None, batch_size: int = 8):
        if batch_size < 1:
            raise MossError(f"batch size is {batch_size}, expected at least 1")
        self.config = config
        self.params = params
        self.mesh = mesh
        ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // ways) * ways

    def check(self, length: int, name: str) -> None:
        """Raises MossError when the model was not made for this many rows."""
        most = self.config.max_position_embeddings
        if length > most:
            raise MossError(f"{name}: has {length} rows, expected at most the model's {most}")

    def likelihoods(self, groups: Sequence[Sequence[Passage]]) -> Iterator[list[tuple[int, list[float]]]]:
        """Log-likelihoods of groups of passages that belong together (the endings of one story).

        Yields:
            After each call the groups that it completed: (index of the group, log-likelihood of each passage).
        """
        plans: dict[tuple, list[tuple[int, int]]] = {}
        for index, group in enumerate(groups):
            size = padded_length(max(len(passage.rows) for passage in group))
            spoken = np.concatenate([p.rows[p.scored, 0] == self.config.modality_pad_id for p in group])
            branches = ("text",) * (not spoken.all()) + ("audio",) * bool(spoken.any())
            plans.setdefault((size, branches), []).extend((index, place) for place in range(len(group)))
        found: dict[int, dict[int, float]] = {}
        for (size, branches), places in sorted(plans.items()):
            for first in range(0, len(places), self.batch_size):
                part = places[first : first + self.batch_size]
                passages = [groups[index][place] for index, place in part]
                grid = self._grid([p.rows for p in passages], size)
                scored = np.zeros((self.batch_size, size), bool)
                for row, passage in enumerate(passages):
                    scored[row, 1 : len(passage.rows)] = passage.scored[1:]
                with self._on_mesh():
                    inputs = self._placed(grid, scored)
                    sums = log_likelihoods(self.params, *inputs, config=self.config, branches=branches)
                complete = []
                for (index, place), value in zip(part, np.asarray(sums), strict=False):
                    own = found.setdefault(index, {})
                    own[place] = float(value)
                    if len(own) == len(groups[index]):
                        del found[index]
                        complete.append((index, [own[i] for i in range(len(own))]))
                yield complete

    def choices(
        self, prompts: Sequence[np.ndarray], candidates: Sequence[Sequence[int]]
    ) -> Iterator[list[tuple[int, list[float]]]]:
        """log p of text ids as the next row after each prompt [N, 2]; yields as `likelihoods` does."""
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
                    found = np.asarray(next_log_probabilities(self.params, *inputs, config=self.config))
                yield [(i, found[row, : len(candidates[i])].tolist()) for row, i in enumerate(part)]

    def apply(self, function: Callable[..., Any], rows: Sequence[np.ndarray], size: int) -> Any:
        """`function(params, grid)` of one batch of rows [N, 2] each, padded on the right to `size`."""
        with self._on_mesh():
            return function(self.params, *self._placed(self._grid(rows, size)))

    def _grid(self, rows: Sequence[np.ndarray], size: int) -> np.ndarray:
        grid = np.empty((self.batch_size, size, 2), np.int32)
        grid[:] = self.config.endoftext_id, self.config.audio_pad_id
        for row, own in enumerate(rows):
            grid[row, : len(own)] = own
        return grid

    def _placed(self, *arrays):
        if self.mesh is None:
            return arrays
        axes = [("batch", *(None,) * (x.ndim - 1)) for x in arrays]
        return tuple(jax.device_put(x, fitting(a, x.shape, self.mesh)) for x, a in zip(arrays, axes, strict=True))

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

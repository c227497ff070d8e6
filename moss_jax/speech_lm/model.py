"""The layer-split language model: Qwen3 layers, shared up to a depth, then a text branch and an audio branch.

A row of the grid is a text id and an audio id; one of them is embedded. Every row passes the shared stack and both
branches, whatever its modality; each branch ends in a norm and a head of its own.

    text, audio ids -> embed -> shared -+-> text  -> norm -> head -> text logits
                                        +-> audio -> norm -> head -> audio logits

Dimension letters: B batch, T rows of this call, S columns of the cache, D embed, V vocabulary.
Source: arXiv 2510.00499.
"""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.nn.qwen3 import ACTIVATION_AXES, Embed, Head, KVCache, RMSNorm, Stack
from moss_jax.nn.tree import param_axes, param_shapes
from moss_jax.sharding import constrain
from moss_jax.speech_lm.config import SpeechLMConfig


class Branch(Stack):
    """The layers of one channel, with its embedding table, final norm and head."""

    vocab_size: int = 0

    def setup(self) -> None:
        super().setup()
        self.embed = Embed(self.config, self.vocab_size)
        self.norm = RMSNorm(self.config.rms_norm_eps, self.config.param_dtype)
        self.head = Head(self.config, self.vocab_size)


class LayerSplitModel(nn.Module):
    """The language model. Parameters are under `shared/`, `text/`, `audio/`, the layers of each stacked on axis 0.

    `num_lower_layers` divides the shared layers into two stacks, so that the lower ones can be frozen arrays of their
    own: the first ones are then under `shared_lower/`, the others under `shared/`.
    """

    config: SpeechLMConfig
    num_lower_layers: int = 0
    unroll: bool = False  # see `moss_jax.nn.qwen3.Stack`

    def setup(self) -> None:
        cfg = self.config
        if self.num_lower_layers:
            self.shared_lower = Stack(cfg, self.num_lower_layers, self.unroll)
        if cfg.num_shared_layers > self.num_lower_layers:
            self.shared = Stack(cfg, cfg.num_shared_layers - self.num_lower_layers, self.unroll)
        self.text = Branch(cfg, cfg.num_modality_layers, self.unroll, cfg.text_vocab_size)
        if cfg.audio_vocab_size:
            self.audio = Branch(cfg, cfg.num_modality_layers, self.unroll, cfg.audio_vocab_size)

    def embed(self, grid: jax.Array) -> jax.Array:
        """int grid [B, T, 2] (text id, audio id) -> [B, T, D]. The audio id counts where text is modality_pad only."""
        text = grid[..., 0]
        audio = grid[..., 1]
        x = self.text.embed(text)
        if self.config.audio_vocab_size:
            x = jnp.where((text == self.config.modality_pad_id)[..., None], self.audio.embed(audio), x)
        return constrain(x.astype(self.config.dtype), *ACTIVATION_AXES)

    def block(
        self,
        name: str,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        cache: KVCache | None = None,
        index: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Runs the stack "shared", "text" or "audio".

        Without a cache (training, scoring): a row attends to the rows before it in its own segment. With one (prefill
        in chunks of any length, decoding): the call's keys and values are written to columns index .. index+T-1 and a
        row in column i attends to column j if j <= i and valid[b, j]; columns from `index` on are overwritten or
        ignored.

        Args:
            x: [B, T, D].
            positions: int [B, T], for RoPE; the same for all stacks.
            segment_ids: int [B, T] or None, without a cache only; left padding is segment 0.
            cache: of this stack, S columns, index + T <= S.
            index: int scalar, the first column to write.
            valid: bool [B, S], True where a column holds a row that may be attended to, this call's rows included.

        Returns:
            y [B, T, D] without a cache; (y, KVCache) with one.
        """
        stack: Stack = getattr(self, name)
        if cache is None:
            return stack(x, positions, segment_ids)
        assert index is not None and valid is not None, "a cache needs index and valid"
        return stack.cached(x, positions, cache, index, valid)

    def logits(self, branch: str, y: jax.Array) -> jax.Array:
        """Final norm and head of the branch "text" or "audio": y [B, T, D] -> float32 [B, T, V]."""
        module: Branch = getattr(self, branch)
        return module.head(module.norm(y))

    def hidden(
        self, grid: jax.Array, positions: jax.Array, segment_ids: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Whole sequences up to the heads: {channel: normed output [B, T, D]}.

        The one statement of the forward pass. With `mutable="intermediates"` in `apply` the output of every layer is
        returned as well, see `moss_jax.nn.qwen3.Layer`.

        Args:
            grid: int [B, T, 2].
            positions: int [B, T], for RoPE.
            segment_ids: int [B, T]; a row attends to its own segment only. None: one segment.
        """
        x = self.embed(grid)
        if self.num_lower_layers:
            x = self.shared_lower(x, positions, segment_ids)
        if self.config.num_shared_layers > self.num_lower_layers:
            x = self.shared(x, positions, segment_ids)
        outputs = {}
        for channel in self.config.channels:
            branch: Branch = getattr(self, channel.name)
            outputs[channel.name] = branch.norm(branch(x, positions, segment_ids))
        return outputs

    def __call__(
        self, grid: jax.Array, positions: jax.Array, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """grid int [B, T, 2] -> text and audio logits, float32 [B, T, V]; the latter None without an audio branch."""
        outputs = self.hidden(grid, positions, segment_ids)
        text = self.text.head(outputs["text"])
        audio = self.audio.head(outputs["audio"]) if "audio" in outputs else None
        return text, audio


def init_cache(config: SpeechLMConfig, batch: int, capacity: int, dtype: str | None = None) -> dict[str, KVCache]:
    """Empty caches {"shared", "text", "audio"} for `batch` rows of `capacity` columns; dtype None is the config's."""
    layers = {"shared": config.num_shared_layers}
    layers |= {channel.name: config.num_modality_layers for channel in config.channels}
    return {name: KVCache.zeros(config, depth, batch, capacity, dtype) for name, depth in layers.items()}


def model_shapes(config: SpeechLMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat {path: ShapeDtypeStruct} of the parameters."""
    return dict(_shapes(_without_kernels(config)))


def model_axes(config: SpeechLMConfig) -> dict[str, tuple[str | None, ...]]:
    """Flat {path: logical axis names} of the parameters, for `moss_jax.sharding.shardings_for`."""
    return dict(_axes(_without_kernels(config)))


def _without_kernels(config: SpeechLMConfig) -> SpeechLMConfig:
    return replace(config, attention="xla", remat="none")  # the kernels reject the single row of _GRID


@functools.cache
def _shapes(config: SpeechLMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return param_shapes(LayerSplitModel(config), _GRID, _POSITIONS)


@functools.cache
def _axes(config: SpeechLMConfig) -> dict[str, tuple[str | None, ...]]:
    return param_axes(LayerSplitModel(config), _GRID, _POSITIONS)


_GRID = np.zeros((1, 1, 2), np.int32)
_POSITIONS = np.zeros((1, 1), np.int32)

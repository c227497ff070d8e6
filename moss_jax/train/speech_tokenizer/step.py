"""The training step of a speech tokenizer: recognition from the codes, reconstruction, commitment, and the codebook.

The gradient passes the quantiser unchanged (straight-through estimator). The codebook has no gradient: each code is an
exponential moving average (EMA) of the vectors that chose it. A code that is no longer used is replaced by a random
vector of the batch. Before the first step all codes are unused, so the initial codebook consists of data.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from moss_jax.audio.features import log_mel_16k
from moss_jax.nn.quantize import ema_update, straight_through, unit
from moss_jax.nn.tree import unflatten
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import Encoder
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.speech_tokenizer.head import Head
from moss_jax.train.speech_tokenizer.run import Objective
from moss_jax.train.speech_tokenizer.units import BLANK
from moss_jax.train.state import TrainState, apply_update

Flat = dict[str, jax.Array]
CODEBOOK = "encoder/codebook"  # the only parameter without a gradient; it is in the state's `extra`


def perplexity(counts: jax.Array | np.ndarray) -> jax.Array:
    """The number of evenly used codes with the same entropy: [K] -> 1 to K."""
    share = counts / jnp.maximum(counts.sum(), 1e-8)
    return jnp.exp(-(share * jnp.log(jnp.maximum(share, 1e-10))).sum())


def log_mel(config: SpeechTokenizerConfig, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(log-mel [B, frames, M], number of codes of each clip int32 [B]), the same as in `SpeechTokenizer.encode`."""
    codes = -(-batch["samples"] // config.samples_per_code)
    return log_mel_16k(batch["wave"], codes * config.samples_per_code, config.mel), codes


class Recogniser:
    """The losses and the recognised units as functions of parameters and batches.

    Args:
        units: number of text units.
        begin: units before each transcript, for the attention head.
        end: the unit after it.
    """

    def __init__(
        self,
        config: SpeechTokenizerConfig,
        objective: Objective,
        units: int,
        begin: tuple[int, ...] = (BLANK,),
        end: int = BLANK,
    ):
        self.config = config
        self.objective = objective
        self.begin = begin
        self.end = end
        self.head = Head(config, objective, units)

    def sums(self, params: Flat, codebook: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The losses of a batch and the values they were computed from.

        Returns:
            asr, mel, commitment: (sum, count) of each loss; asr in nats per unit.
            vectors: float32 [B, T, C], of the encoder before quantisation.
            codes: int32 [B, T].
            valid: bool [B, T].
            memory: float32 [B, T, D], what the recogniser attends to.
        """
        config = self.config
        tree = unflatten(params)
        frames, lengths = log_mel(config, batch)
        encoder = tree["encoder"] | {"codebook": codebook}
        apply_encoder: Callable[..., Any] = Encoder(config).apply
        vectors, codes = apply_encoder({"params": encoder}, frames, method="vectors")
        valid = (jnp.arange(codes.shape[1])[None] < lengths[:, None]) & (batch["weight"] > 0)[:, None]
        chosen = (unit(codebook) if config.normalize_codes else codebook)[codes]
        quantized = straight_through(vectors, chosen)
        with_positions = quantized + encoder["code_positions"][None, : codes.shape[1]]
        memory = self._head(tree, "memory", with_positions, valid)
        with jax.named_scope("recognise"):
            asr = (
                self._ctc(tree, memory, valid, batch)
                if self.objective.head == "ctc"
                else self._attention(tree, memory, valid, batch)
            )
        with jax.named_scope("mel"):
            weights = jnp.repeat(valid, config.frames_per_code, 1).astype(jnp.float32)
            reconstructed = self._head(tree, "mel", jnp.where(valid[..., None], quantized, 0))
            error = jnp.square(reconstructed - frames).mean(-1)
            mel = (error * weights).sum(), weights.sum()
        distance = jnp.square(vectors - jax.lax.stop_gradient(chosen))
        # The squared distance of unit vectors, the mean over the entries of others.
        distance = distance.sum(-1) if config.normalize_codes else distance.mean(-1)
        commitment = (distance * valid).sum(), valid.sum().astype(jnp.float32)
        return {
            "asr": asr,
            "mel": mel,
            "commitment": commitment,
            "vectors": vectors,
            "codes": codes,
            "valid": valid,
            "memory": memory,
        }

    def _head(self, tree: Mapping[str, Any], method: str, *inputs: jax.Array) -> jax.Array:
        apply: Callable[..., Any] = self.head.apply
        return apply({"params": tree["head"]}, *inputs, method=method)

    def _ctc(
        self, tree: Mapping[str, Any], memory: jax.Array, valid: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """(sum, count) of the CTC loss."""
        logits = self._head(tree, "ctc_logits", memory)
        labels = batch["labels"]
        count = batch["label_count"]
        position = jnp.arange(labels.shape[1])[None]
        repeated = (labels[:, 1:] == labels[:, :-1]) & (position[:, 1:] < count[:, None])
        # A clip with more units (and blanks between repeated ones) than codes has no alignment: its loss is infinite.
        fits = (count + repeated.sum(1) <= valid.sum(1)) & (batch["weight"] > 0)
        padding = (position >= count[:, None]).astype(jnp.float32)
        loss = optax.ctc_loss(logits, 1 - valid.astype(jnp.float32), labels, padding, blank_id=BLANK)
        return jnp.where(fits, loss, 0).sum(), (count * fits).sum().astype(jnp.float32)

    def _attention(
        self, tree: Mapping[str, Any], memory: jax.Array, valid: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """(sum, count) of the cross-entropy of the attention head."""
        labels = batch["labels"]
        count = batch["label_count"]
        first = len(self.begin) - 1
        inputs = jnp.concatenate([jnp.broadcast_to(jnp.array(self.begin), (len(labels), first + 1)), labels], 1)
        position = jnp.arange(labels.shape[1] + 1)[None]
        targets = jnp.where(position < count[:, None], jnp.pad(labels, ((0, 0), (0, 1))), self.end)
        logits = self._head(tree, "decode", inputs, memory, valid)[:, first:]
        weights = (position <= count[:, None]) * batch["weight"][:, None]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (loss * weights).sum(), weights.sum()

    def recognised(self, params: Flat, parts: Mapping[str, Any], width: int) -> jax.Array:
        """Greedy recognition.

        Args:
            parts: of `sums`.
            width: maximum number of units, for the attention head.

        Returns:
            int32 [B, T], the best unit of each code, for CTC; [B, width], units up to `end`, for attention.
        """
        tree = unflatten(params)
        if self.objective.head == "ctc":
            best = self._head(tree, "ctc_logits", parts["memory"]).argmax(-1)
            return jnp.where(parts["valid"], best, BLANK).astype(jnp.int32)
        rows = parts["memory"].shape[0]
        first = len(self.begin)
        units = jnp.full((rows, first + width), self.end, jnp.int32).at[:, :first].set(jnp.array(self.begin))

        def decode_unit(position: jax.Array, units: jax.Array) -> jax.Array:
            logits = self._head(tree, "decode", units, parts["memory"], parts["valid"])
            best = logits[:, position - 1].argmax(-1).astype(jnp.int32)
            ended = (position > first) & (units[:, position - 1] == self.end)
            return units.at[:, position].set(jnp.where(ended, self.end, best))

        return jax.lax.fori_loop(first, first + width, decode_unit, units)[:, first:]


def loss_of(sums: Mapping[str, Any], objective: Objective, step: ArrayLike) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(the weighted loss, {"asr_loss", "mel_loss", "commitment_loss"}), means of `Recogniser.sums`.

    Args:
        step: from 0.
    """
    parts = {name: sums[name][0] / jnp.maximum(sums[name][1], 1) for name in ("asr", "mel", "commitment")}
    commitment = jnp.where(jnp.asarray(step) >= objective.commitment_from, objective.commitment_weight, 0.0)
    weights = {"asr": objective.asr_weight, "mel": objective.mel_weight, "commitment": commitment}
    loss = jnp.float32(0)
    for name, value in parts.items():
        loss += weights[name] * value
    return loss, {f"{name}_loss": value for name, value in parts.items()}


def make_step(recogniser: Recogniser, optimizer: OptimizerConfig, seed: int, shardings: Any) -> Callable[..., Any]:
    """The (state, frozen, batch, limit) -> (state, metrics) that is compiled once for each bucket.

    Metrics in addition to those of every task: asr_loss, mel_loss, commitment_loss; perplexity, of the batch; code_use,
    the share of codes whose moving average of use is at least a tenth of the mean.
    """
    objective = recogniser.objective

    def step(
        state: TrainState, frozen: Flat, batch: Mapping[str, jax.Array], limit: ArrayLike = jnp.inf
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(params: Flat) -> tuple[jax.Array, Any]:
            sums = recogniser.sums(params, state.extra["codebook"], batch)
            value, parts = loss_of(sums, objective, state.step)
            return value, (parts, sums)

        (value, (parts, sums)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        with jax.named_scope("codebook"):
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            book = ema_update(
                state.extra,
                sums["vectors"],
                sums["codes"],
                sums["valid"],
                key,
                max_decay=objective.ema_decay,
                restart_below=objective.restart_below,
            )
        with jax.named_scope("update"):
            state, update = apply_update(state, grads, value, limit, optimizer, book)
        count = state.extra["count"]
        size = state.extra["count"].shape[0]
        chosen = jax.ops.segment_sum(sums["valid"].astype(jnp.float32).ravel(), sums["codes"].ravel(), size)
        use = {"perplexity": perplexity(chosen), "code_use": (count > 0.1 * count.mean()).mean()}
        return state, {"loss": value, **parts, **use, **update}

    return jax.jit(step, donate_argnums=0, out_shardings=shardings)

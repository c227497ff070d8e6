"""The training step of a speech tokenizer: recognition through the codes, reconstruction, commitment, and a codebook
that follows the vectors by moving averages.

The gradient passes the quantiser as if it were not there (straight through). The codebook has none: each code is the
mean of the vectors that chose it, over a while; a code that nobody chooses is put where a random vector of the batch
is. Before the first step every code is such a code, so that the codebook begins inside the data.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moss_jax.audio.features import log_mel_16k
from moss_jax.nn.quantize import ema_update, straight_through, unit
from moss_jax.nn.tree import unflatten
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encoder import Encoder
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.speech_tokenizer.head import Head
from moss_jax.train.speech_tokenizer.run import Objective
from moss_jax.train.speech_tokenizer.units import BLANK
from moss_jax.train.state import TrainState, updated

Flat = dict[str, jax.Array]
CODEBOOK = "encoder/codebook"  # the one parameter without a gradient; it lies in the state's `extra`


def perplexity(counts: jax.Array) -> jax.Array:
    """How many codes used evenly would be as hard to guess: [K] -> 1 to K."""
    share = counts / jnp.maximum(counts.sum(), 1e-8)
    return jnp.exp(-(share * jnp.log(jnp.maximum(share, 1e-10))).sum())


def log_mel(config: SpeechTokenizerConfig, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(log-mel [B, frames, M], how many codes each clip has, int32 [B]) as `SpeechTokenizer.encode` makes them."""
    codes = -(-batch["samples"] // config.samples_per_code)
    return log_mel_16k(batch["wave"], codes * config.samples_per_code, config.mel), codes


class Recogniser:
    """The losses, and what is recognised, from parameters and batches.

    Args:
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
        """{part: (sum, count)} of the losses "asr" (nats a unit), "mel" and "commitment", and under "vectors", "codes",
        "valid", "memory" what they were made of."""
        config = self.config
        tree = unflatten(params)
        frames, lengths = log_mel(config, batch)
        encoder = tree["encoder"] | {"codebook": codebook}
        vectors, codes = Encoder(config).apply({"params": encoder}, frames, method="vectors")
        valid = (jnp.arange(codes.shape[1]) < lengths[:, None]) & (batch["weight"] > 0)[:, None]
        chosen = (unit(codebook) if config.normalize_codes else codebook)[codes]
        through = straight_through(vectors, chosen)
        placed = through + encoder["code_positions"][: codes.shape[1]]
        memory = self._head(tree, "memory", placed, valid)
        with jax.named_scope("recognise"):
            asr = (
                self._ctc(tree, memory, valid, batch)
                if self.objective.head == "ctc"
                else self._attention(tree, memory, valid, batch)
            )
        with jax.named_scope("mel"):
            weights = jnp.repeat(valid, config.frames_per_code, 1).astype(jnp.float32)
            made = self._head(tree, "mel", jnp.where(valid[..., None], through, 0))
            error = jnp.square(made - frames).mean(-1)
            mel = (error * weights).sum(), weights.sum()
        distance = jnp.square(vectors - jax.lax.stop_gradient(chosen))
        # Of unit vectors the whole distance counts, of others the mean over their entries.
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
        return self.head.apply({"params": tree["head"]}, *inputs, method=method)

    def _ctc(self, tree, memory, valid, batch) -> tuple[jax.Array, jax.Array]:
        logits = self._head(tree, "ctc_logits", memory)
        labels = batch["labels"]
        count = batch["label_count"]
        place = jnp.arange(labels.shape[1])
        again = (labels[:, 1:] == labels[:, :-1]) & (place[1:] < count[:, None])
        # A clip with more units than codes has no alignment and would only give an infinite loss.
        fits = (count + again.sum(1) <= valid.sum(1)) & (batch["weight"] > 0)
        padding = (place >= count[:, None]).astype(jnp.float32)
        loss = optax.ctc_loss(logits, 1 - valid.astype(jnp.float32), labels, padding, blank_id=BLANK)
        return jnp.where(fits, loss, 0).sum(), (count * fits).sum().astype(jnp.float32)

    def _attention(self, tree, memory, valid, batch) -> tuple[jax.Array, jax.Array]:
        labels = batch["labels"]
        count = batch["label_count"]
        first = len(self.begin) - 1
        inputs = jnp.concatenate([jnp.broadcast_to(jnp.array(self.begin), (len(labels), first + 1)), labels], 1)
        place = jnp.arange(labels.shape[1] + 1)
        targets = jnp.where(place < count[:, None], jnp.pad(labels, ((0, 0), (0, 1))), self.end)
        logits = self._head(tree, "decode", inputs, memory, valid)[:, first:]
        weights = (place <= count[:, None]) * batch["weight"][:, None]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (loss * weights).sum(), weights.sum()

    def recognised(self, params: Flat, parts: Mapping[str, Any], width: int) -> jax.Array:
        """Greedily, int32 [B, T] or [B, width]: of CTC the best unit of each code, of attention units up to `end`."""
        tree = unflatten(params)
        if self.objective.head == "ctc":
            best = self._head(tree, "ctc_logits", parts["memory"]).argmax(-1)
            return jnp.where(parts["valid"], best, BLANK).astype(jnp.int32)
        rows = parts["memory"].shape[0]
        first = len(self.begin)
        units = jnp.full((rows, first + width), self.end, jnp.int32).at[:, :first].set(jnp.array(self.begin))

        def say(place, units):
            logits = self._head(tree, "decode", units, parts["memory"], parts["valid"])
            best = logits[:, place - 1].argmax(-1).astype(jnp.int32)
            ended = (place > first) & (units[:, place - 1] == self.end)
            return units.at[:, place].set(jnp.where(ended, self.end, best))

        return jax.lax.fori_loop(first, first + width, say, units)[:, first:]


def loss_of(sums: Mapping[str, Any], objective: Objective, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(the whole loss, {"asr_loss", "mel_loss", "commitment_loss"}), each a mean; `step` counts from 0."""
    parts = {name: sums[name][0] / jnp.maximum(sums[name][1], 1) for name in ("asr", "mel", "commitment")}
    commitment = jnp.where(step >= objective.commitment_from, objective.commitment_weight, 0.0)
    weights = {"asr": objective.asr_weight, "mel": objective.mel_weight, "commitment": commitment}
    loss = sum(weights[name] * value for name, value in parts.items())
    return loss, {f"{name}_loss": value for name, value in parts.items()}


def make_step(recogniser: Recogniser, optimizer: OptimizerConfig, seed: int, shardings: Any) -> Callable:
    """The compiled (state, frozen, batch, limit) -> (state, metrics), once for each bucket.

    Metrics beside those of every task: asr_loss, mel_loss, commitment_loss; perplexity, of the batch; code_use, the
    share of codes that by the moving averages are chosen at least a tenth as often as the mean.
    """
    objective = recogniser.objective

    def step(state: TrainState, frozen: Flat, batch: Mapping[str, jax.Array], limit=jnp.inf):
        def loss(params):
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
            state, told = updated(state, grads, value, limit, optimizer, book)
        count = state.extra["count"]
        size = state.extra["count"].shape[0]
        chosen = jax.ops.segment_sum(sums["valid"].astype(jnp.float32).ravel(), sums["codes"].ravel(), size)
        use = {"perplexity": perplexity(chosen), "code_use": (count > 0.1 * count.mean()).mean()}
        return state, {"loss": value, **parts, **use, **told}

    return jax.jit(step, donate_argnums=0, out_shardings=shardings)

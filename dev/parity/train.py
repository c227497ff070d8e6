"""Parity of training: losses, gradient norms and one stage-1 update of a packed batch."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dev.parity.golden import Golden, Mismatch
from dev.parity.transformer import mask_and_positions, read_config
from dev.parity.transformer import split_params as golden_params
from moss_jax.convert.tables import speech_lm as released
from moss_jax.documents import parse_json, parse_object
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.speech_lm.stages import STAGE_1, STAGE_2, split_params
from moss_jax.train.speech_lm.step import batch_nll, gradients, make_eval_step, make_step
from moss_jax.train.state import init_state

IGNORED = -100  # label of an entry that does not count
SMALL_GRADIENT = 1e-5  # the contract's rule for updates


def train_step(golden: Golden) -> dict:
    """Component lm.train_step: the whole batch with everything trainable, each loss alone, and one step of stage 1."""
    return by_contract(golden, *measured(golden))


def measured(golden: Golden) -> tuple[dict, dict[str, np.ndarray]]:
    """All outputs, and the gradients of stage 1 by released name."""
    config = read_config(golden)
    table = released.table(config)
    params = flatten(golden_params(golden, config))
    batch, ignored = _batch(golden, config)
    _optimizer(golden)  # a bad file fails before anything is computed
    results = {}
    # The nll of every labelled entry; entry t is the loss of predicting row t + 1.
    everything, no_frozen = split_params(params, STAGE_2)
    nll = jax.jit(partial(batch_nll, config))(everything, no_frozen, batch)
    for index, channel in enumerate(config.channels):
        labelled = np.zeros(ignored.shape[:2], bool)
        labelled[:, :-1] = ~ignored[:, 1:, index]
        results[f"{channel.name}_nll"] = np.where(labelled, nll[channel.name], 0)
    metrics = make_eval_step(config, STAGE_2)(everything, no_frozen, batch)
    results |= {key: metrics[key] for key in ("text_loss", "audio_loss", "text_count", "audio_count")}
    results["total_loss"] = metrics["loss"]
    # Gradients of the total and of each loss alone, everything trainable.
    only = {"full": (1.0, 1.0), "text_only": (1.0, 0.0), "audio_only": (0.0, 1.0)}
    for name, weights in only.items():
        results |= _norms(name, table, _gradient(config, STAGE_2, everything, no_frozen, batch, weights))
    updates, grads = _stage_1(golden, config, table, params, batch)
    return results | updates, grads


def by_contract(golden: Golden, results: dict, grads: dict[str, np.ndarray]) -> dict:
    """The outputs as the contract compares them. Where a gradient is small, AdamW's first step is the sign of rounding
    noise: there the file's value replaces ours if the two are within two learning rates."""
    if "small_gradients" not in golden.contract:
        return results
    results = dict(results)
    rate = _optimizer(golden).learning_rate
    for tensor, grad in grads.items():
        name = f"stage1/updated/{tensor}"
        ours = results[name]
        expected = golden.outputs.get(name)
        if expected is not None and expected.shape == ours.shape:
            small = (grad != 0) & (np.abs(grad) < SMALL_GRADIENT) & (np.abs(ours - expected) <= 2 * rate)
            results[name] = np.where(small, expected, ours)
    return results


def _batch(golden: Golden, config: SpeechLMConfig) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Our batch, and which labels are ignored. A label that is not ignored must equal the id in the grid."""
    grid = golden.need("grid")
    labels = golden.need("labels")
    segments = golden.inputs.get("segment_ids", np.ones(grid.shape[:2], np.int32))
    _, positions = mask_and_positions(golden, grid.shape[:2])
    ignored = labels == IGNORED
    weights = np.where(ignored, 0, 1).astype(np.float32)
    targets = np.where(ignored, grid, labels)  # ignored labels may differ from the grid
    batch = {"grid": grid, "positions": positions, "segment_ids": segments, "loss_weights": weights}
    if not np.array_equal(targets, grid):
        raise Mismatch("input/labels differ from input/grid where they are not ignored, expected equal ids")
    return jax.tree.map(jnp.asarray, batch), ignored


@partial(jax.jit, static_argnums=(0, 1))
def _differentiated(config, stage, trainable, frozen, batch, weights):
    stage = replace(stage, text_weight=weights[0], audio_weight=weights[1])
    return gradients(config, stage, trainable, frozen, batch)[1]


def _gradient(config, stage, trainable, frozen, batch, weights=(1.0, 1.0)) -> dict[str, np.ndarray]:
    """The gradient that the step passes to the optimizer, for these weights of the text and the audio loss."""
    grads = _differentiated(config, stage, trainable, frozen, batch, jnp.asarray(weights))
    return {path: np.asarray(value) for path, value in grads.items()}


def _norms(name: str, table, grads) -> dict:
    """Norms by released tensor, by group (the first part of the released name), and of everything."""
    squares = {}
    groups: dict[str, float] = {}
    for tensor, value in table.to_theirs(grads):
        square = float(np.square(value.astype(np.float64)).sum())
        squares[tensor] = square
        parts = tensor.removeprefix("model.").split(".")
        groups[parts[0]] = groups.get(parts[0], 0.0) + square
    results = {f"{name}/grad_norm/{tensor}": math.sqrt(square) for tensor, square in squares.items()}
    results |= {f"{name}/group_grad_norm/{group}": math.sqrt(square) for group, square in groups.items()}
    return results | {f"{name}/global_grad_norm": math.sqrt(sum(squares.values()))}


def _stage_1(golden: Golden, config, table, params, batch) -> tuple[dict, dict[str, np.ndarray]]:
    """One step of stage 1: updated parameters and the losses after it. Frozen parameters must keep their bytes."""
    optimizer = _optimizer(golden)
    trainable, frozen = split_params(params, STAGE_1)
    before = {path: np.asarray(value).tobytes() for path, value in frozen.items()}
    _check_selection(golden, table, trainable, frozen)
    grads = dict(table.to_theirs(_gradient(config, STAGE_1, trainable, frozen, batch)))
    state, metrics = make_step(config, STAGE_1, optimizer)(init_state(trainable, optimizer), frozen, batch)
    after = make_eval_step(config, STAGE_1)(state.params, frozen, batch)
    results = {"stage1/global_grad_norm": metrics["grad_norm"]}
    results |= {f"stage1/{channel.name}_loss_after": after[f"{channel.name}_loss"] for channel in config.channels}
    if changed := [path for path, value in frozen.items() if np.asarray(value).tobytes() != before[path]]:
        raise Mismatch(f"{len(changed)} frozen parameters changed, the first is {changed[0]}")
    for tensor, value in table.to_theirs({path: np.asarray(leaf) for path, leaf in state.params.items()}):
        results[f"stage1/updated/{tensor}"] = value
    return results, grads


def _optimizer(golden: Golden) -> OptimizerConfig:
    """The settings of AdamW in the file: a constant rate, no clipping by default."""
    try:
        given = parse_object(golden.meta["optimizer"])
        return OptimizerConfig(
            learning_rate=given["lr"],
            schedule="constant",
            betas=tuple(given["betas"]),
            eps=given["eps"],
            weight_decay=given["weight_decay"],
            clip_norm=given.get("clip_norm"),
        )
    except (KeyError, ValueError, TypeError, MossError) as error:
        raise Mismatch(f"metadata 'optimizer' is not AdamW's settings ({error!r})") from error


def _check_selection(golden: Golden, table, trainable, frozen) -> None:
    """Stage 1 trains and freezes the tensors that the file lists."""
    for key, ours in (("trainable", trainable), ("frozen", frozen)):
        if key not in golden.meta:
            continue
        listed = set(parse_json(golden.meta[key]))
        found = set(table.shapes(ours))
        if listed != found:
            raise Mismatch(f"metadata {key!r}: {sorted(listed ^ found)[0]} is only in the file or only in stage 1")


COMPONENTS = {"lm.train_step": train_step}

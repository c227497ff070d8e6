"""The training step: which parameters it updates; remat, unrolling and accumulation do not change the result."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.errors import MossError
from moss_jax.nn.qwen3 import Stack
from moss_jax.nn.tree import unflatten
from moss_jax.speech_lm import LayerSplitModel
from moss_jax.train.optimizer import OptimizerConfig, make_optimizer
from moss_jax.train.speech_lm.stages import SHARED_ONLY, STAGE_1, STAGE_2, layerwise, split_params, stage_shapes
from moss_jax.train.speech_lm.step import gradients, make_eval_step, make_step
from moss_jax.train.state import TrainState, init_state
from tests.compilations import compilations
from tests.train.small import SMALL, random_batch, random_params

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, total_steps=30, warmup_steps=2)


def close(a, b, tolerance=1e-5):
    """Every entry within `tolerance` of the largest of its array."""
    for path in b:
        scale = float(jnp.abs(b[path]).max()) or 1.0
        np.testing.assert_allclose(a[path], b[path], rtol=0, atol=tolerance * scale, err_msg=path)


def gradients_of(stage, params=None, batch=None, config=SMALL, **options):
    trainable, frozen = split_params(params or random_params(), stage)
    run = jax.jit(lambda t, f, b: gradients(config, stage, t, f, b, sources=2, **options))
    return run(trainable, frozen, batch or random_batch())


@pytest.fixture(scope="module")
def full():
    """Metrics and gradients with everything trainable."""
    return gradients_of(STAGE_2)


def test_many_steps_of_stage_1_leave_every_frozen_byte():
    trainable, frozen = split_params(random_params(), STAGE_1, frozen_dtype="bfloat16")
    before = {path: np.asarray(value).tobytes() for path, value in frozen.items()}
    start = {path: np.asarray(value) for path, value in trainable.items()}
    config = replace(SMALL, dtype="bfloat16")
    step = make_step(config, STAGE_1, OPTIMIZER, sources=2)
    state = init_state(trainable, OPTIMIZER)
    losses = []
    with compilations() as compiled:
        for i in range(30):
            state, metrics = step(state, frozen, random_batch(seed=i % 2))
            losses.append(float(metrics["loss"]))
    assert {path: np.asarray(value).tobytes() for path, value in frozen.items()} == before
    assert sorted(state.params) == sorted(start) and int(state.step) == 30
    assert all((np.asarray(value) != start[path]).any() for path, value in state.params.items())
    assert losses[-1] < losses[0] - 1
    assert compiled.count("step") == 1
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in start.values())


@pytest.mark.parametrize("stage", [STAGE_1, SHARED_ONLY, layerwise(1)])
def test_a_stage_has_its_part_of_the_whole_gradient(full, stage):
    metrics, grads = gradients_of(stage)
    np.testing.assert_allclose(metrics["loss"], full[0]["loss"], rtol=1e-6)
    upper = {path: x[-grads[path].shape[0] :] for path, x in full[1].items() if path in grads}
    close(grads, upper)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_no_gradient(full, accumulate):
    metrics, grads = gradients_of(STAGE_2, accumulate=accumulate)
    close(grads, full[1])
    close(metrics, full[0])


def test_accumulation_must_divide_the_rows():
    with pytest.raises(MossError, match="accumulate is 3, expected a divisor of the batch's 8 rows"):
        gradients_of(STAGE_1, accumulate=3)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(full, remat):
    metrics, grads = gradients_of(STAGE_2, config=replace(SMALL, remat=remat))
    close(grads, full[1])
    close(metrics, full[0])


def test_a_remat_policy_saves_the_products_it_names():
    def products(remat):
        trainable, frozen = split_params(random_params(), STAGE_2)
        config = replace(SMALL, remat=remat)
        jaxpr = jax.make_jaxpr(lambda t, f, b: gradients(config, STAGE_2, t, f, b))(trainable, frozen, random_batch())
        return str(jaxpr).count("dot_general[")

    none, dots, full = map(products, ("none", "dots", "full"))
    assert none <= dots < full  # "dots" computes attention again, "full" every product


def test_a_loop_over_layers_changes_no_gradient(full):
    metrics, grads = gradients_of(STAGE_2, unroll=True)
    close(grads, full[1])
    close(metrics, full[0])


def test_layers_one_by_one_give_the_gradients_of_the_scan(full):
    params = random_params()
    batch = random_batch()

    def loss(flat):
        def block(name, x):
            layers = {p.removeprefix(f"{name}/"): v for p, v in flat.items() if p.startswith(f"{name}/layers/")}
            for i in range(next(iter(layers.values())).shape[0]):
                one = unflatten({path: value[i : i + 1] for path, value in layers.items()})
                x = Stack(SMALL, 1).apply({"params": one}, x, batch["positions"], batch["segment_ids"])
            return x

        nested = {"params": unflatten(flat)}
        model = LayerSplitModel(SMALL)
        h = block("shared", model.apply(nested, batch["grid"], method="embed"))
        total = 0.0
        for channel, name in enumerate(("text", "audio")):
            logits = jax.nn.log_softmax(model.apply(nested, name, block(name, h), method="logits"))[:, :-1]
            nll = -jnp.take_along_axis(logits, batch["grid"][:, 1:, channel, None], -1)[..., 0]
            weights = batch["loss_weights"][:, 1:, channel]
            total += (nll * weights).sum() / weights.sum()
        return total

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(full[0]["loss"], value, rtol=1e-6)
    close(full[1], grads)


def test_losses_of_one_channel_train_its_own_branch_only(full):
    _, text = gradients_of(replace(STAGE_2, audio_weight=0.0))
    assert not any(text[path].any() for path in text if path.startswith(("audio/layers", "audio/norm", "audio/head")))
    assert text["audio/embed/embedding"].any() and text["shared/layers/mlp/up/kernel"].any()
    _, audio = gradients_of(replace(STAGE_2, text_weight=0.0))
    close({path: text[path] + audio[path] for path in text}, full[1])


def test_metrics_say_what_was_trained_on(full):
    metrics = full[0]
    batch = random_batch()
    for channel, name in enumerate(("text", "audio")):
        count = float(batch["loss_weights"][:, 1:, channel].sum())
        assert metrics[f"{name}_count"] == count == metrics[f"source_{name}_count"].sum()
        np.testing.assert_allclose(metrics[f"source_{name}_sum"].sum() / count, metrics[f"{name}_loss"], rtol=1e-5)
    trainable, frozen = split_params(random_params(), STAGE_1)
    evaluated = make_eval_step(SMALL, STAGE_1, sources=2)(trainable, frozen, batch)
    close(evaluated, {key: metrics[key] for key in evaluated})


def test_a_step_that_is_not_accepted_changes_nothing():
    trainable, frozen = split_params(random_params(), STAGE_1)
    step = make_step(SMALL, STAGE_1, OPTIMIZER, sources=2)
    state = init_state(trainable, OPTIMIZER)
    batch = random_batch()
    inf = np.float32(np.inf)
    state, metrics = step(state, frozen, batch, np.array([inf, inf]))
    assert metrics["skipped"] == 0 and metrics["learning_rate"] == np.float32(0.5e-2)
    kept = [np.asarray(x) for x in jax.tree.leaves((state.params, state.opt_state))]
    broken = frozen | {"text/norm/scale": frozen["text/norm/scale"] * np.nan}
    low = float(metrics["loss"]) / 2, float(metrics["grad_norm"]) / 2
    for weights, limit in ((frozen, (low[0], inf)), (frozen, (inf, low[1])), (broken, (inf, inf))):
        state, metrics = step(state, weights, batch, np.array(limit, np.float32))
        assert metrics["skipped"] == 1
        for x, y in zip(jax.tree.leaves((state.params, state.opt_state)), kept, strict=True):
            assert np.asarray(x).tobytes() == y.tobytes()
    state, metrics = step(state, frozen, batch, np.array([inf, inf]))
    assert int(state.step) == 5 and metrics["skipped"] == 0 and metrics["learning_rate"] == np.float32(1e-2)


def test_a_plain_qwen3_trains_on_text():
    config = replace(SMALL, num_shared_layers=0, audio_vocab_size=0)
    trainable, frozen = split_params(random_params(config), STAGE_2)
    step = make_step(config, STAGE_2, OPTIMIZER, sources=2)
    state = init_state(trainable, OPTIMIZER)
    batch = random_batch(config)
    state, first = step(state, frozen, batch)
    for _ in range(3):
        state, last = step(state, frozen, batch)
    assert last["loss"] < first["loss"] and "audio_loss" not in last


def test_frozen_weights_cost_no_gradient_and_no_moments():
    """By the compiler's memory analysis, at a size where weights dominate."""
    config = replace(SMALL, hidden_size=256, intermediate_size=1024, num_shared_layers=6, remat="full")
    batch = jax.eval_shape(lambda: random_batch(rows=1))
    used = {}
    for stage in (STAGE_1, STAGE_2):
        trainable, frozen = stage_shapes(config, stage, "float32")
        moments = jax.eval_shape(make_optimizer(OPTIMIZER).init, trainable)
        state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, moments)
        compiled = make_step(config, stage, OPTIMIZER, sources=2).lower(state, frozen, batch).compile()
        used[stage.name] = compiled.memory_analysis()
    sizes = [sum(4 * leaf.size for leaf in part.values()) for part in stage_shapes(config, STAGE_1)]
    trainable, frozen = sizes
    rest = 1 << 20
    assert used["stage1"].argument_size_in_bytes < 3 * trainable + frozen + rest
    assert used["stage2"].argument_size_in_bytes > 3 * (trainable + frozen)
    saved = used["stage2"].temp_size_in_bytes - used["stage1"].temp_size_in_bytes
    assert saved > 0.9 * frozen  # the gradient of the frozen weights

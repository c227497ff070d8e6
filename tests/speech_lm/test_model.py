"""The layer-split model: against transformers, against itself through the cache, unrolled, and at full size."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moss_jax
from moss_jax.checkpoint.config_io import read_config, write_config
from moss_jax.convert import layer_split
from moss_jax.convert.tables import qwen3, speech_lm
from moss_jax.errors import MossError
from moss_jax.nn.qwen3 import Layer, LayerInputs
from moss_jax.nn.rope import rope_angles
from moss_jax.nn.tree import flatten, param_shapes, unflatten
from moss_jax.recipes.nano.sizes import LANGUAGE_MODEL
from moss_jax.speech_lm import MOSS_SPEECH_8B, QWEN3_8B, TINY, LayerSplitModel, SpeechLMConfig, init_cache

ROWS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
GRID = jax.ShapeDtypeStruct((1, 8, 2), jnp.int32)
MODEL = LayerSplitModel(TINY)


def random_params(config, seed=0):
    """Random parameters, also for the norms, so that a norm that is left out or swapped shows."""
    rng = np.random.default_rng(seed)
    flat = {
        path: jnp.asarray(rng.normal(path.endswith("scale"), 0.15, leaf.shape), leaf.dtype)
        for path, leaf in param_shapes(LayerSplitModel(config), GRID, ROWS).items()
    }
    return unflatten(flat)


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


def random_grid(rng, batch, length):
    text = rng.integers(0, TINY.text_vocab_size, (batch, length))
    text = np.where(rng.random((batch, length)) < 0.5, TINY.modality_pad_id, text)
    return np.stack([text, rng.integers(0, TINY.audio_vocab_size, (batch, length))], -1).astype(np.int32)


def padded(rng, lengths, total):
    """A left-padded batch: grid, valid [B, T], positions [B, T]."""
    grid = random_grid(rng, len(lengths), total)
    valid = np.arange(total) >= total - np.asarray(lengths)[:, None]
    grid[~valid] = (TINY.endoftext_id, TINY.audio_pad_id)
    return grid, valid, np.where(valid, np.cumsum(valid, 1) - 1, 1).astype(np.int32)


forward = jax.jit(lambda params, *args: MODEL.apply({"params": params}, *args))


@partial(jax.jit, static_argnums=0)
def cached_step(model, params, grid, positions, caches, index, valid):
    """One call of the whole model on new rows: both logits and the caches."""
    call = partial(model.apply, {"params": params})

    def block(name, x):
        y, caches[name] = call(name, x, positions, cache=caches[name], index=index, valid=valid, method="block")
        return y

    caches = dict(caches)
    h = block("shared", call(grid, method="embed"))
    logits = {name: call(name, block(name, h), method="logits") for name in ("text", "audio")}
    return logits, caches


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 24), min_size=2, max_size=2),
    chunks=st.lists(st.sampled_from([1, 3, 8]), min_size=24, max_size=24),
)
def test_any_chunking_through_the_cache_equals_one_pass(params, seed, lengths, chunks):
    rng = np.random.default_rng(seed)
    total = 24
    capacity = 32
    grid, valid, positions = padded(rng, lengths, total)
    expected = forward(params, grid, positions, valid.astype(np.int32))
    seen = np.concatenate([valid, rng.random((2, capacity - total)) < 0.5], 1)  # unwritten columns: any value
    caches = jax.tree.map(lambda x: x + 7.0, init_cache(TINY, 2, capacity))
    at = 0
    got = []
    for chunk in chunks:
        chunk = chunk if at + chunk <= total else 1
        if at == total:
            break
        rows = slice(at, at + chunk)
        logits, caches = cached_step(MODEL, params, grid[:, rows], positions[:, rows], caches, at, seen)
        got.append(logits)
        at += chunk
    for name, whole in zip(("text", "audio"), expected, strict=True):
        pieces = np.concatenate([logits[name] for logits in got], 1)
        mask = valid[:, : pieces.shape[1]]
        np.testing.assert_allclose(pieces[mask], np.asarray(whole)[:, : pieces.shape[1]][mask], atol=2e-4, rtol=1e-4)


def test_left_padding_changes_nothing(params):
    grid, valid, positions = padded(np.random.default_rng(1), [5, 17], 17)
    together = forward(params, grid, positions, valid.astype(np.int32))
    for row, length in enumerate([5, 17]):
        alone = forward(params, grid[row : row + 1, -length:], np.arange(length)[None])
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[row, -length:], theirs[0], atol=2e-4)


def test_packed_segments_do_not_see_each_other(params):
    grid = random_grid(np.random.default_rng(2), 1, 16)
    segments = np.repeat([1, 2, 0], [7, 6, 3])[None]
    positions = np.concatenate([np.arange(7), np.arange(6), np.zeros(3, int)])[None]
    packed = forward(params, grid, positions, segments)
    for start, stop in ((0, 7), (7, 13)):
        alone = forward(params, grid[:, start:stop], np.arange(stop - start)[None])
        for ours, theirs in zip(packed, alone, strict=True):
            np.testing.assert_allclose(ours[:, start:stop], theirs, atol=2e-4)


def test_no_row_depends_on_a_later_one(params):
    x = jax.random.normal(jax.random.key(0), (1, 9, TINY.hidden_size))
    positions = jnp.arange(9)[None]
    run = jax.jit(lambda x: MODEL.apply({"params": params}, "shared", x, positions, method="block")[0, 4].sum())
    gradient = np.abs(jax.grad(run)(x)).sum((0, 2))
    assert (gradient[:5] > 0).all() and (gradient[5:] == 0).all()


def test_only_the_chosen_channel_is_embedded(params):
    rng = np.random.default_rng(3)
    grid = random_grid(rng, 2, 20)
    other = random_grid(rng, 2, 20)
    audio_row = grid[..., 0] == TINY.modality_pad_id
    changed = np.stack([grid[..., 0], np.where(audio_row, grid[..., 1], other[..., 1])], -1)
    embed = partial(MODEL.apply, {"params": params}, method="embed")
    np.testing.assert_array_equal(embed(grid), embed(changed))
    np.testing.assert_array_equal(embed(grid)[audio_row], params["audio"]["embed"]["embedding"][grid[audio_row][:, 1]])


def test_scanned_layers_equal_a_loop_over_layers(params):
    x = jax.random.normal(jax.random.key(0), (2, 11, TINY.hidden_size))
    positions = jnp.arange(11)[None].repeat(2, 0)
    y = x
    for layer in range(TINY.num_shared_layers):
        one = jax.tree.map(lambda p, i=layer: p[i], params["shared"]["layers"])
        inputs = LayerInputs(*rope_angles(positions, TINY.head_dim, TINY.rope_theta))
        y, _ = Layer(TINY).apply({"params": one}, y, inputs)
    scanned = MODEL.apply({"params": params}, "shared", x, positions, method="block")
    np.testing.assert_allclose(scanned, y, atol=1e-5)


def test_depth_does_not_grow_the_program(params):
    def size(depth):
        config = replace(TINY, num_shared_layers=depth)
        tree = unflatten(param_shapes(LayerSplitModel(config), GRID, ROWS))
        return len(str(jax.make_jaxpr(partial(LayerSplitModel(config).apply))({"params": tree}, GRID, ROWS)))

    assert abs(size(30) - size(3)) < 200  # some more digits in shapes, no more equations


def test_remat_changes_no_gradient():
    config = replace(TINY, num_shared_layers=2, num_modality_layers=1, audio_vocab_size=0)
    params = random_params(config)
    grid = random_grid(np.random.default_rng(4), 2, 12)
    positions = np.arange(12)[None].repeat(2, 0)

    def gradient(remat):
        model = LayerSplitModel(replace(config, remat=remat))

        def loss(params):
            return jax.nn.log_softmax(model.apply({"params": params}, grid, positions)[0]).std()

        traced = jax.jit(jax.grad(loss)).trace(params)
        return traced.lower().compile()(params), str(traced.jaxpr)

    plain, program = gradient("none")
    assert "remat" not in program
    for remat in ("dots", "full"):
        ours, program = gradient(remat)
        assert "remat" in program
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4), ours, plain)


def test_bfloat16_keeps_float32_logits_and_follows_float32(params):
    config = replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
    grid = random_grid(np.random.default_rng(5), 2, 30)
    positions = np.arange(30)[None].repeat(2, 0)
    small = jax.tree.map(lambda p: np.asarray(p).astype(jnp.bfloat16), params)
    text, _ = jax.jit(LayerSplitModel(config).apply)({"params": small}, grid, positions)
    exact, _ = forward(jax.tree.map(lambda p: p.astype(np.float32), small), grid, positions)
    assert text.dtype == jnp.float32
    error = jnp.linalg.norm(text - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.05
    assert init_cache(config, 1, 4)["audio"].k.dtype == jnp.bfloat16


def test_full_size_names_and_shapes():
    tree = param_shapes(LayerSplitModel(MOSS_SPEECH_8B), GRID, ROWS)
    assert sum(np.prod(leaf.shape, dtype=np.int64) for leaf in tree.values()) == 9_095_694_336
    assert {leaf.dtype for leaf in tree.values()} == {jnp.dtype("bfloat16")}
    shapes = speech_lm.table(MOSS_SPEECH_8B).shapes(tree)
    layer = {
        "self_attn.q_proj.weight": (4096, 4096),
        "self_attn.o_proj.weight": (4096, 4096),
        "self_attn.k_proj.weight": (1024, 4096),
        "self_attn.v_proj.weight": (1024, 4096),
        "self_attn.q_norm.weight": (128,),
        "self_attn.k_norm.weight": (128,),
        "mlp.gate_proj.weight": (12288, 4096),
        "mlp.up_proj.weight": (12288, 4096),
        "mlp.down_proj.weight": (4096, 12288),
        "input_layernorm.weight": (4096,),
        "post_attention_layernorm.weight": (4096,),
    }
    expected = {
        "model.embed_tokens.weight": (151680, 4096),
        "text_lm_head.weight": (151680, 4096),
        "model.audio_embed.weight": (16512, 4096),
        "audio_lm_head.weight": (16512, 4096),
        "model.text_norm.weight": (4096,),
        "model.audio_norm.weight": (4096,),
    }
    for block, depth in {"shared": 32, "text": 4, "audio": 4}.items():
        for i in range(depth):
            expected |= {f"model.{block}_block.layers.{i}.{name}": shape for name, shape in layer.items()}
    assert shapes == expected and len(shapes) == 446

    plain = qwen3.table(QWEN3_8B).shapes(param_shapes(LayerSplitModel(QWEN3_8B), GRID, ROWS))
    expected = {f"model.layers.{i}.{name}": shape for i in range(36) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (151936, 4096), "lm_head.weight": (151936, 4096)}
    assert plain == expected | {"model.norm.weight": (4096,)} and len(plain) == 399


@pytest.mark.parametrize("tied", [False, True])
def test_long_positions_against_transformers(tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = replace(layer_split.qwen3_config(TINY, 336), rope_theta=1e4, max_position_embeddings=2048)
    torch.manual_seed(0)
    theirs_config = transformers.Qwen3Config(
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=5,
        vocab_size=336,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rope_theta=1e4,
        tie_word_embeddings=tied,
    )
    theirs = transformers.Qwen3ForCausalLM(theirs_config).eval()
    ids = torch.randint(0, TINY.modality_pad_id, (2, 500))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    positions = (mask.cumsum(1) - 1).clamp(0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits.numpy()
    weights = {k: v.numpy() for k, v in theirs.state_dict().items() if not (tied and k == "lm_head.weight")}
    tree = param_shapes(LayerSplitModel(config), GRID, ROWS)
    if tied:
        del tree["text/head/kernel"]
    flat = qwen3.table(config).to_ours(weights, tree, "weights")
    grid = np.stack([ids.numpy()] * 2, -1) % TINY.modality_pad_id
    real = mask.numpy() != 0
    grid[..., 1] %= TINY.audio_vocab_size

    def check(config, flat, expected):
        apply = jax.jit(LayerSplitModel(config).apply)
        logits, _ = apply({"params": unflatten(flat)}, grid, positions.numpy(), mask.numpy())
        np.testing.assert_allclose(logits[real], expected[real], atol=1e-3, rtol=1e-4)

    if not tied:
        check(config, flat, expected)
    target = replace(TINY, rope_theta=1e4)
    split = dict(layer_split.new_audio_tables(target, seed=0))
    for path, value in flat.items():
        split |= layer_split.split_parameter(path, value, target, tied)
    shapes = param_shapes(LayerSplitModel(target), GRID, ROWS)
    assert {path: value.shape for path, value in split.items()} == {k: leaf.shape for k, leaf in shapes.items()}
    check(target, split, expected[..., : TINY.text_vocab_size])


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"hidden_size": 0},
        {"dtype": "int8"},
        {"attention": "flash"},
        {"remat": "some"},
        {"eosp_id": 96},
        {"sosp_id": 320},
        {"num_shared_layers": -1},
    ],
)
def test_a_config_that_contradicts_itself_is_an_error(change):
    with pytest.raises(MossError, match=next(iter(change)) if "head" not in str(change) else "head"):
        replace(TINY, **change)


def test_channels_are_the_columns_that_the_model_predicts():
    text, audio = TINY.channels
    assert (text.name, text.vocab_size, text.pad_id) == ("text", 320, TINY.endoftext_id)
    assert (audio.name, audio.vocab_size, audio.pad_id) == ("audio", 96, TINY.audio_pad_id)
    assert [channel.name for channel in QWEN3_8B.channels] == ["text"]
    assert set(init_cache(replace(TINY, audio_vocab_size=0), 1, 4)) == {"shared", "text"}


def test_config_json_is_one_flat_object():
    """The layout of every system folder and run folder, also those of earlier versions."""
    file = Path(moss_jax.__file__).parent / "assets" / "nano" / "transformer" / "config.json"
    stored = json.loads(file.read_text())
    config = read_config(SpeechLMConfig, stored, "config.json")
    assert config == replace(LANGUAGE_MODEL, param_dtype="bfloat16")  # exported in another dtype than it was trained in
    assert write_config(config) == stored


def test_parameters_carry_logical_axes():
    import flax.linen as nn

    boxed = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 2, 2), int), jnp.zeros((1, 2), int)))
    specs = flatten(nn.get_partition_spec(boxed)["params"])
    shapes = flatten(nn.unbox(boxed)["params"])
    assert all(len(specs[path]) == shapes[path].ndim for path in shapes)
    assert tuple(specs["audio/layers/attention/k/kernel"]) == ("layers", "embed", "kv_heads", "head_dim")


def test_the_gradient_of_a_frequent_id_does_not_drown_in_bfloat16():
    config = replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
    model = LayerSplitModel(config)
    gradient = np.random.default_rng(0).normal(0.3, 1, (1, 4096, 64)).astype(np.float32)
    grid = jnp.zeros((1, 4096, 2), jnp.int32)
    tables = {"text": {"embed": {"embedding": jnp.zeros((320, 64), jnp.bfloat16)}}}
    tables |= {"audio": {"embed": {"embedding": jnp.zeros((96, 64), jnp.bfloat16)}}}

    def total(params):
        return (model.apply({"params": params}, grid, method="embed").astype(jnp.float32) * gradient).sum()

    ours = jax.grad(total)(tables)["text"]["embed"]["embedding"][0].astype(jnp.float32)
    np.testing.assert_allclose(ours, gradient[0].sum(0), rtol=1e-2)

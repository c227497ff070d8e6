"""The flow offline: parts against their formulas and torch, padding and batching that change nothing, bad input."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dev.parity import check_golden, read_golden
from moss_jax.convert.tables.flow import table
from moss_jax.errors import MossError
from moss_jax.nn import attention
from moss_jax.nn.tree import flatten, param_shapes
from moss_jax.speech_decoder.flow import positions, sampler
from moss_jax.speech_decoder.flow.config import RELEASED_CHUNK_5, TINY
from moss_jax.speech_decoder.flow.estimator import gelu, mish
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.flow.noise import noise
from tests.compilations import compilations


@pytest.fixture(scope="module")
def params():
    return tiny_params(TINY)


def tiny_params(config):
    """Random parameters in which no bias is zero and no scale one, and codes differ as much as they should."""
    shapes = jax.eval_shape(lambda: FlowModel(config).init(jax.random.key(0)))
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: x, shapes["params"]))
    random = np.random.default_rng(0)

    def draw(leaf):
        fan_in = max(np.prod(leaf.shape[:-1]), 1) if len(leaf.shape) > 1 else 10
        return jnp.asarray(random.normal(size=leaf.shape) / min(fan_in, 30) ** 0.5, jnp.float32)

    from flax.linen import meta

    return meta.unbox(jax.tree.unflatten(tree, [draw(leaf) for leaf in leaves]))


def make_voice(config, prompt_codes, seed=0):
    random = np.random.default_rng(seed)
    return SimpleNamespace(
        codes=random.integers(0, config.codebook_size, prompt_codes).astype(np.int32),
        mel=random.normal(size=(prompt_codes * config.frames_per_code, config.mel_bins)).astype(np.float32),
        embedding=random.normal(size=config.speaker_size).astype(np.float32),
    )


def make_codes(config, count, seed=1):
    return np.random.default_rng(seed).integers(0, config.codebook_size, count).astype(np.int32)


def test_noise_is_the_reference_buffer():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    expected = torch.randn([1, 80, 15000]).numpy().transpose(0, 2, 1)
    ours = noise()
    assert ours is noise()
    np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(ours[0, :4, 0], [-1.1258, -1.1524, -0.2506, -0.4339], atol=5e-5)


def test_activations_are_torch_s():
    functional = pytest.importorskip("torch").nn.functional
    torch = pytest.importorskip("torch")
    x = np.linspace(-30, 60, 2001, dtype=np.float32)
    np.testing.assert_allclose(mish(x), functional.mish(torch.tensor(x)).numpy(), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(gelu(x), functional.gelu(torch.tensor(x)).numpy(), rtol=2e-6, atol=1e-6)


def test_sinusoids_are_exact_up_to_the_longest_position():
    places = np.array([0, 1, 127, 128, 129, 4097, 14999])
    rates = np.exp(-np.arange(0, 64, 2) * np.log(10000) / 64)
    angle = places[:, None] * rates
    expected = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(len(places), 64)
    np.testing.assert_allclose(positions.sinusoids(jnp.asarray(places), 64), expected, atol=3e-7)


@pytest.mark.parametrize("first", [0, 9000])
def test_relative_attention_is_the_formula(first):
    random = np.random.default_rng(0)
    rows = 11
    heads = 2
    width = 4
    size = 8
    q, k, v, u, w = (random.normal(size=(1, rows, heads, width)) for _ in range(5))
    kernel = random.normal(size=(size, heads, width))
    r = np.arange(rows)[:, None] - np.arange(rows)[None]
    rates = np.exp(-np.arange(0, size, 2) * np.log(10000) / size)
    pe = np.stack([np.sin(r[..., None] * rates), np.cos(r[..., None] * rates)], -1).reshape(rows, rows, size)
    p = np.einsum("ijd,dnh->ijnh", pe, kernel)
    scores = np.einsum("binh,bjnh->bnij", q + u, k) + np.einsum("binh,ijnh->bnij", q + w, p)
    mask = np.asarray(attention.chunk_mask(rows, jnp.arange(rows)[None] < 10, 4))
    scores = np.where(mask[:, None], scores / width**0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnij,bjnh->binh", weights / weights.sum(-1, keepdims=True), v)

    q, k, v, u, w, kernel = (jnp.asarray(x, jnp.float32) for x in (q, k, v, u, w, kernel))
    turn = positions.sinusoids(first + jnp.arange(rows), size)
    ours = attention.masked_attention(q + u, k, v, mask, (), positions.relative_query(q + w, kernel, turn), turn)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_blocks_of_queries_give_the_same_result(monkeypatch):
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, 23, 2, 4)), jnp.float32) for _ in range(3))
    turned, turn = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((2, 23, 2, 6), (23, 6)))
    mask = attention.chunk_mask(23, jnp.arange(23)[None] < jnp.array([[23], [14]]), 5)
    whole = attention.masked_attention(q, k, v, mask, (), turned, turn)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    np.testing.assert_allclose(attention.masked_attention(q, k, v, mask, (), turned, turn), whole, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("streaming", "finalize"), [(False, True), (True, False)])
def test_other_lengths_of_a_bucket_compile_nothing_and_padding_changes_nothing(params, streaming, finalize):
    voice = make_voice(TINY, 6)
    flags = {"streaming": streaming, "finalize": finalize}
    mels = {}
    for count in (10, 3, 7):  # 16, 9 and 13 codes with the prompt: one bucket
        codes = make_codes(TINY, count)
        with compilations() as compiled:
            mels[count] = sampler.decode(params, TINY, codes, voice, **flags)
        assert count == 10 or compiled == []
        assert mels[count].shape == (1, 4 * (count if finalize else count - 3), TINY.mel_bins)
    buffer = noise(TINY.noise_frames, TINY.mel_bins)[:, : 4 * 13]  # leaves no room for padding
    with compilations() as compiled:
        exact = sampler.decode(params, TINY, make_codes(TINY, 7), voice, buffer=buffer, **flags)
    assert compiled.count("run") == 1
    np.testing.assert_allclose(mels[7], exact, atol=3e-6 * np.abs(exact).max())


@pytest.mark.slow
def test_items_of_a_batch_are_independent(params):
    random = np.random.default_rng(2)
    codes = random.integers(0, 90, (2, 12)).astype(np.int32)
    prompt = np.zeros((2, 48, TINY.mel_bins), np.float32)
    prompt[:, :8] = random.normal(size=(2, 8, TINY.mel_bins))
    embedding = random.normal(size=(2, TINY.speaker_size)).astype(np.float32)
    count = np.array([12, 7])
    z = noise(TINY.noise_frames, TINY.mel_bins)
    flow = jax.jit(lambda *inputs: sampler.flow(params, TINY, z, *inputs)[-1])
    both = flow(codes, count, prompt, embedding)
    alone = flow(codes[1:, :7], count[1:], prompt[1:, :28], embedding[1:])
    np.testing.assert_allclose(both[1, :28], alone[0], atol=3e-6 * np.abs(alone).max())


@pytest.mark.slow
def test_streaming_never_looks_beyond_its_chunk_and_the_lookahead(params):
    # chunks end at 5, 10, 15, 20
    codes = make_codes(TINY, 16)
    voice = make_voice(TINY, 4)
    changed = codes.copy()
    changed[9:] = (changed[9:] + 7) % 90  # absolute code 13 and later: frames of codes 0..9 stay
    mels = [
        np.asarray(sampler.decode(params, TINY, c, voice, streaming=True, finalize=False)) for c in (codes, changed)
    ]
    np.testing.assert_array_equal(mels[0][:, : 6 * 4], mels[1][:, : 6 * 4])
    assert np.abs(mels[0][:, 6 * 4 :] - mels[1][:, 6 * 4 :]).max() > 1e-3
    full = np.asarray(sampler.decode(params, TINY, changed, voice, finalize=False))
    assert np.abs(full - mels[1])[:, : 6 * 4].max() > 1e-3, "without the chunk mask the past sees the future"


def test_no_prompt_and_no_speaker(params):
    mel = sampler.decode(params, TINY, make_codes(TINY, 1), make_voice(TINY, 0))
    assert mel.shape == (1, 4, TINY.mel_bins) and np.isfinite(mel).all()


@pytest.mark.parametrize(
    ("codes", "flags", "message"),
    [
        (np.zeros(0, np.int32), {}, "at least one"),
        (np.zeros((1, 3), np.int32), {}, "in a row"),
        (np.ones(3), {}, "float64"),
        (np.array([1, 2, 90]), {}, "code 90 at position 2 is out of range, expected 0..89"),
        (np.array([-1, 2]), {}, "code -1 at position 0"),
        (np.zeros(295, np.int32), {}, "295 codes after a prompt of 6 are too long, expected at most 300"),
        (np.zeros(2, np.int32), {"finalize": False}, "look-ahead of 3"),
    ],
)
def test_invalid_codes_raise(params, codes, flags, message):
    with pytest.raises(MossError, match=message) as error:
        sampler.decode(params, TINY, codes, make_voice(TINY, 6), **flags)
    assert "\n" not in str(error.value)


def test_the_table_names_the_released_tensors():
    names = table(RELEASED_CHUNK_5).shapes(param_shapes(FlowModel(RELEASED_CHUNK_5)))
    assert len(names) == 1121
    assert sum(np.prod(shape) for shape in names.values()) == 120_724_464
    assert names["input_embedding.weight"] == (20480, 512)
    assert names["encoder.up_layer.conv.weight"] == (512, 512, 9)
    assert names["encoder.up_encoders.3.self_attn.pos_bias_v"] == (8, 64)
    assert names["decoder.estimator.down_blocks.0.0.block1.block.0.weight"] == (256, 320, 3)
    assert names["decoder.estimator.mid_blocks.11.1.3.attn1.to_out.0.weight"] == (256, 512)
    assert names["decoder.estimator.up_blocks.0.0.res_conv.weight"] == (256, 512, 1)
    assert names["decoder.estimator.final_proj.weight"] == (80, 256, 1)
    assert table(RELEASED_CHUNK_5).is_carried("epoch") and not table(RELEASED_CHUNK_5).is_carried("encoder.epoch")


def test_the_table_reads_back_what_it_wrote(params):
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    theirs = dict(table(TINY).to_theirs(flat))
    back = table(TINY).to_ours({**theirs, "epoch": np.array(3), "step": np.array(4)}, flat, "flow.pt")
    assert all(np.array_equal(back[path], leaf) for path, leaf in flat.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["upsample_encoder", "cfm_estimator", "cfm_rand_noise", "flow_inference"])
def test_golden(golden, name):
    checks = list(check_golden(read_golden(golden(f"codec/{name}"))))
    assert checks and all(check.passed for check in checks), [check for check in checks if not check.passed]

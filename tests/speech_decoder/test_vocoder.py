"""The HiFT vocoder: against torch, against itself at other lengths, and its names at full size."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dev.parity import check_golden, read_golden
from moss_jax.convert.tables.vocoder import spelling, table
from moss_jax.errors import MossError
from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.speech_decoder.vocoder.config import RELEASED, TINY
from moss_jax.speech_decoder.vocoder.model import HiFT, NormConv, conv_transpose1d, fold_weight_norm, snake
from moss_jax.speech_decoder.vocoder.stft import istft, stft

FRAMES = 12


def shapes(config):
    mel = jnp.zeros((1, 2, config.mel_bins))
    noise = jnp.zeros((1, 2 * config.hop, config.harmonics))
    return param_shapes(HiFT(config), mel, noise)


def random_params(config, seed=0):
    """Flat parameters with an F0 in the voiced range and waves that are not clipped."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path.endswith(("alpha1", "alpha2")):
            return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
        if path.endswith("/g"):
            return rng.uniform(0.5, 1, leaf.shape).astype(np.float32)
        return (rng.normal(size=leaf.shape) * (0.1 if path.endswith("bias") else 0.2)).astype(np.float32)

    params = {path: draw(path, leaf) for path, leaf in shapes(config).items()}
    params["f0_classifier/bias"] = np.full(1, 150, np.float32)
    params["f0_classifier/kernel"] *= 200
    return params


@pytest.fixture(scope="module")
def vocoder():
    config = replace(TINY, weight_norm=False)
    params = unflatten(fold_weight_norm(random_params(TINY)))
    return config, jax.jit(
        lambda *xs, method="__call__": HiFT(config).apply({"params": params}, *xs, method=method),
        static_argnames="method",
    )


def draws(frames, config=TINY, seed=1):
    rng = np.random.default_rng(seed)
    mel = rng.normal(-3, 2, (1, frames, config.mel_bins)).astype(np.float32)
    return mel, rng.normal(size=(1, frames * config.hop, config.harmonics)).astype(np.float32)


@pytest.mark.parametrize("rate, width", [(8, 16), (5, 11), (3, 7), (2, 2), (4, 6)])
def test_transposed_convolution_is_torchs(rate, width):
    torch = pytest.importorskip("torch")

    rng = np.random.default_rng(rate)
    x, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((2, 7, 6), (width, 6, 4), (4,)))
    theirs = torch.nn.functional.conv_transpose1d(
        torch.tensor(x).mT, torch.tensor(kernel).permute(1, 2, 0), torch.tensor(bias), rate, (width - rate) // 2
    ).mT
    np.testing.assert_allclose(conv_transpose1d(*map(jnp.asarray, (x, kernel, bias)), rate), theirs, atol=1e-5)


def test_stft_and_its_inverse_are_torchs():
    torch = pytest.importorskip("torch")

    rng = np.random.default_rng(0)
    wave = rng.normal(size=(2, 160)).astype(np.float32)
    window = torch.hann_window(16)
    theirs = torch.stft(torch.tensor(wave), 16, 4, window=window, return_complex=True)
    ours = stft(jnp.asarray(wave), 16, 4)
    np.testing.assert_allclose(ours, torch.cat([theirs.real, theirs.imag], 1).mT, atol=1e-5)
    spectrum = rng.normal(size=ours.shape).astype(np.float32)
    real, imaginary = np.split(spectrum.swapaxes(1, 2), 2, 1)
    theirs = torch.istft(torch.complex(torch.tensor(real), torch.tensor(imaginary)), 16, 4, window=window)
    np.testing.assert_allclose(istft(jnp.asarray(spectrum), 16, 4), theirs, atol=1e-5)


def test_snake_at_large_arguments():
    x = np.linspace(-50, 50, 2001, dtype=np.float32)[:, None]
    alpha = np.array([0.01, 0.3, 1, 7], np.float32)
    exact = x + np.sin(np.float64(x) * alpha) ** 2 / np.float64(alpha)
    np.testing.assert_allclose(snake(jnp.asarray(x), jnp.asarray(alpha)), exact, atol=3e-5)


def test_sines_follow_the_f0(vocoder):
    """A constant F0 gives sines of that frequency: against the closed form, over 40 s."""
    config, _ = vocoder
    f0 = np.full((1, 2000), 187.3, np.float32)
    weights = unflatten(fold_weight_norm(random_params(TINY)))
    weights["merge"] = {"kernel": np.eye(config.harmonics, 1, dtype=np.float32), "bias": np.zeros(1, np.float32)}
    noise = jnp.zeros((1, f0.size * config.hop, config.harmonics))
    source, phases = HiFT(config).apply({"params": weights}, f0, noise, method="source")
    turns = np.float64(np.float32(187.3) / np.float32(24000) * np.float32(config.hop))
    inner = np.arange(240, f0.size * config.hop - 240)
    exact = np.tanh(0.1 * np.sin(2 * np.pi * turns * ((inner + 0.5) / config.hop + 0.5)))
    np.testing.assert_allclose(source[0, inner], exact, atol=3e-4)
    again, _ = HiFT(config).apply(
        {"params": weights},
        f0[:, 700:],
        noise[:, 700 * config.hop :],
        None,
        phases[:, 699],
        np.ones(1, bool),
        method="source",
    )
    np.testing.assert_array_equal(again[0], source[0, 700 * config.hop :])


@pytest.mark.parametrize("lengths", [(1, 7), (11, 2), (FRAMES, 7)])
def test_padding_does_not_change_an_item(vocoder, lengths):
    config, run = vocoder
    mel, noise = (np.concatenate([a, b]) for a, b in zip(draws(FRAMES), draws(FRAMES, seed=2), strict=True))
    waves, _ = run(mel, noise, np.array(lengths, np.int32))
    for i, frames in enumerate(lengths):
        samples = frames * config.hop
        alone, _ = run(mel[i : i + 1, :frames], noise[i : i + 1, :samples])
        np.testing.assert_allclose(waves[i, :samples], alone[0], atol=2e-5)


@pytest.mark.slow
def test_folded_weight_norm_gives_the_same_waves(vocoder):
    _, run = vocoder
    mel, noise = draws(4)
    model = HiFT(TINY)
    with_norm, _ = jax.jit(model.apply)({"params": unflatten(random_params(TINY))}, mel, noise)
    np.testing.assert_allclose(with_norm, run(mel, noise)[0], atol=1e-4)
    for layer, transposed in (("conv_pre", False), ("ups_0", True)):  # a fresh g is |v|, so that folding gives v
        fresh = NormConv(4, 3, True, transposed=transposed).init(jax.random.key(0), 6)
        fresh = {f"{layer}/{name}": value for name, value in nn.unbox(fresh)["params"].items()}
        folded = fold_weight_norm(fresh)[f"{layer}/kernel"]
        np.testing.assert_allclose(folded, fresh[f"{layer}/v"], rtol=1e-5)


def test_folding_is_torchs():
    torch = pytest.importorskip("torch")
    from torch.nn.utils.parametrizations import weight_norm

    for module, layer in ((torch.nn.Conv1d(6, 4, 3), "conv_pre"), (torch.nn.ConvTranspose1d(6, 4, 3), "ups_0")):
        module = weight_norm(module)
        with torch.no_grad():
            module.parametrizations.weight.original0.mul_(torch.rand(module.parametrizations.weight.original0.shape))
        g, v = (getattr(module.parametrizations.weight, f"original{i}").detach().numpy() for i in (0, 1))
        order = (2, 1, 0) if layer == "conv_pre" else (2, 0, 1)
        folded = fold_weight_norm({f"{layer}/g": g.reshape(-1), f"{layer}/v": v.transpose(order)})
        theirs = module.weight.detach().numpy().transpose(order)
        np.testing.assert_allclose(folded[f"{layer}/kernel"], theirs, atol=1e-6)


def test_names_and_sizes_of_the_release():
    ours = shapes(RELEASED)
    names = table(RELEASED).shapes(ours)
    assert len(names) == 328
    assert round(sum(np.prod(s, dtype=int) for s in names.values()) / 1e6, 1) == 20.8
    assert names["ups.0.parametrizations.weight.original0"] == (512, 1, 1)
    assert names["ups.1.parametrizations.weight.original1"] == (256, 128, 11)
    assert names["source_downs.0.weight"] == (256, 18, 30)
    assert names["source_downs.2.weight"] == (64, 18, 1)
    assert names["source_resblocks.2.convs2.2.parametrizations.weight.original1"] == (64, 64, 11)
    assert names["resblocks.8.activations1.2.alpha"] == (64,)
    assert names["f0_predictor.condnet.8.parametrizations.weight.original1"] == (512, 512, 3)
    assert names["m_source.l_linear.weight"] == (1, 9)
    assert names["conv_post.bias"] == (18,)


def test_every_spelling_round_trips():
    params = random_params(TINY)
    plain = dict(table(TINY).to_theirs(params))
    old = {name.replace("parametrizations.weight.original0", "weight_g") for name in plain}
    old = {"generator." + name.replace("parametrizations.weight.original1", "weight_v") for name in old}
    for names in (set(plain), old, {"generator." + name for name in plain}):
        found = table(TINY, spelling(names))
        theirs = dict(found.to_theirs(params))
        assert set(theirs) == names
        back = found.to_ours(theirs, shapes(TINY), "test")
        assert all(np.array_equal(back[path], params[path]) for path in params)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"upsample_widths": (16, 11)}, "differ in length"),
        ({"upsample_widths": (16, 11, 6)}, "even number"),
        ({"resblock_dilations": ((1,),)}, "dilations"),
        ({"fft_hop": 5}, "fft_size"),
        ({"channels": 36}, "multiple of 8"),
    ],
)
def test_contradictory_configs_raise(change, words):
    with pytest.raises(MossError, match=words):
        replace(TINY, **change)


@pytest.mark.slow
def test_golden(golden):
    checks = list(check_golden(read_golden(golden("codec/hift"))))
    assert [c.output for c in checks if not c.passed] == []
    assert len(checks) == 7

"""The vocoder's losses against torch and librosa, the discriminators, and that steps teach."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moss_jax.audio.features import MEL_24K, mel_24k
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.speech_decoder.vocoder import HiFT, VocoderConfig
from moss_jax.train.speech_decoder import spectral
from moss_jax.train.speech_decoder.discriminators import (
    DiscriminatorConfig,
    Discriminators,
    discriminator_loss,
    feature_loss,
    generator_loss,
    relativistic_loss,
)
from moss_jax.train.speech_decoder.vocoder import VocoderObjective, cast, losses, mel_configs

CONFIG = VocoderConfig(
    mel_bins=16,
    channels=32,
    upsample_rates=(4,),
    upsample_widths=(8,),
    resblock_widths=(3,),
    resblock_dilations=((1, 3),),
    source_resblock_widths=(3,),
    source_resblock_dilations=((1,),),
    fft_size=480,
    fft_hop=120,
    f0_channels=16,
    f0_layers=2,
    harmonics=3,
    free_phase=True,
    magnitude_limit=1000.0,
)
DISCRIMINATORS = DiscriminatorConfig(periods=(2, 3), period_channels=(4, 8), ffts=(512,), fft_channels=4)
OBJECTIVE = VocoderObjective(resolutions=((512, 128, 512),), discriminators=DISCRIMINATORS)
FRAMES = 6


@pytest.fixture(scope="module")
def waves():
    random = np.random.default_rng(0)
    time = np.arange(FRAMES * CONFIG.hop) / 24000
    real = np.stack([0.3 * np.sin(2 * np.pi * f * time) for f in (150, 220)]) + 0.02 * random.normal(
        size=(2, len(time))
    )
    return real.astype(np.float32), (0.1 * random.normal(size=real.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def batch(waves):
    mel = spectral.log_mel(jnp.asarray(waves[0]), mel_configs(CONFIG)[0])
    f0 = np.repeat(np.array([[150.0], [220.0]], np.float32), FRAMES, 1)
    return {"mel": np.asarray(mel), "wave": waves[0], "f0": f0}


@pytest.fixture(scope="module")
def weights(batch):
    keys = jax.random.split(jax.random.key(0))
    noise = jnp.zeros((1, CONFIG.hop * FRAMES, CONFIG.harmonics))
    mine = jax.jit(HiFT(CONFIG).init)(keys[0], batch["mel"][:1], noise)
    discriminators = jax.jit(Discriminators(DISCRIMINATORS).init)(keys[1], batch["wave"][:1])
    return flatten(nn.unbox(mine)["params"]), flatten(nn.unbox(discriminators)["params"])


@pytest.mark.slow
def test_stft_loss_is_torch_s(waves):
    torch = pytest.importorskip("torch")
    resolutions = ((512, 50, 240), (1024, 120, 600))
    total = 0.0

    def magnitude(wave, fft, hop, window):
        found = torch.stft(torch.tensor(wave), fft, hop, window, torch.hann_window(window), return_complex=True).abs()
        return found.clamp(min=1e-7**0.5)

    for resolution in resolutions:
        x, y = (magnitude(wave, *resolution) for wave in waves)
        np.testing.assert_allclose(spectral.magnitude(waves[0], *resolution), x.transpose(1, 2), atol=2e-4)
        convergence = torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(x)
        total += float(convergence + (x.log() - y.log()).abs().mean())
    np.testing.assert_allclose(spectral.stft_loss(*map(jnp.asarray, waves), resolutions), total / 2, rtol=1e-4)
    silent = np.stack([waves[0][0], 0 * waves[0][0]])
    gradient = jax.grad(lambda generated: spectral.stft_loss(jnp.asarray(silent), generated, resolutions))(
        jnp.asarray(waves[1])
    )
    assert np.abs(gradient[1]).max() < 10 * np.abs(gradient[0]).max()


def test_the_mel_is_that_of_the_features_and_librosa_s(waves):
    ours = spectral.log_mel(jnp.asarray(waves[0]), MEL_24K)
    np.testing.assert_allclose(ours, mel_24k(jnp.asarray(waves[0])), atol=2e-4)
    librosa = pytest.importorskip("librosa")
    padded = np.pad(waves[0], ((0, 0), (720, 720)), mode="reflect")
    theirs = librosa.feature.melspectrogram(
        y=padded, sr=24000, n_fft=1920, hop_length=480, center=False, power=1.0, n_mels=80, fmax=8000
    )
    np.testing.assert_allclose(ours, np.log(np.maximum(theirs, 1e-5)).transpose(0, 2, 1), atol=5e-3)
    distance = spectral.mel_loss(*map(jnp.asarray, waves), (MEL_24K,))
    assert distance > 0.5 and spectral.mel_loss(waves[0], waves[0], (MEL_24K,)) == 0


@pytest.mark.slow
def test_discriminators(weights, waves):
    _, discriminators = weights
    found = jax.jit(Discriminators(DISCRIMINATORS).apply)({"params": unflatten(discriminators)}, jnp.asarray(waves[0]))
    assert len(found) == 3
    for (score, features), depth in zip(found, (3, 3, 4 * 5 + 1), strict=True):
        assert score.shape[0] == 2 and score.shape[-1] == 1 and len(features) == depth
    assert found[0][0].shape[1:3] == (FRAMES * 480 // 2 // 3, 2) and found[1][0].shape[2] == 3
    same = generator_loss(found), discriminator_loss(found, found), feature_loss(found, found)
    scores = [np.asarray(score) for score, _ in found]
    np.testing.assert_allclose(same[0], sum(np.square(1 - s).mean() for s in scores), rtol=1e-5)
    np.testing.assert_allclose(same[1], sum((np.square(1 - s) + s**2).mean() for s in scores), rtol=1e-5)
    assert same[2] == 0


def test_the_relativistic_loss_is_the_formula():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 3, 35)).astype(np.float32)
    expected = 0.0
    tau = 0.5
    for x, y in zip(a, b, strict=True):
        middle = np.median(x - y)
        loss = np.square(x - y - middle)[x < y + middle].mean()
        expected += tau - max(tau - loss, 0)
    better, worse = ([(jnp.asarray(row), []) for row in rows] for rows in (a, b))
    np.testing.assert_allclose(relativistic_loss(better, worse, tau), expected, rtol=1e-5)


@pytest.mark.slow
def test_generator_and_discriminators_learn_from_their_own_losses(weights, batch):
    params = {f"vocoder/{path}": leaf for path, leaf in weights[0].items()}
    params |= {f"judges/{path}": leaf for path, leaf in weights[1].items()}

    def loss(flat, key, step=1, objective=OBJECTIVE, dtype=jnp.float32):
        mine, discriminators = (
            {path.removeprefix(name): leaf for path, leaf in flat.items() if path.startswith(name)}
            for name in ("vocoder/", "judges/")
        )
        mine = unflatten(cast(mine, dtype))
        return losses(mine, unflatten(discriminators), CONFIG, objective, batch, key, step, dtype)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(3, 4))
    key = jax.random.key(0)
    (first, terms), grads = gradient(params, key)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in grads.values())
    expected = 45 * terms["mel_loss"] + terms["stft_loss"] + terms["f0_loss"] + terms["generator_loss"]
    expected += 2 * terms["feature_loss"] + terms["generator_relative_loss"]
    expected += terms["discriminator_loss"] + terms["discriminator_relative_loss"]
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    # Without the adversarial terms the generator's gradient is another one, the discriminators' stays.
    _, early = gradient(params, key, 0, replace(OBJECTIVE, adversarial_from=1))
    for path, leaf in grads.items():
        if path.startswith("judges/"):
            np.testing.assert_allclose(early[path], leaf, rtol=1e-3, atol=1e-5 * float(jnp.abs(leaf).max() + 1e-6))
    post = "vocoder/conv_post/v"
    assert float(jnp.abs(early[post] - grads[post]).max()) > 1e-3 * float(jnp.abs(grads[post]).max())

    update = optax.adam(2e-3)
    state = update.init(params)
    step = jax.jit(update.update)
    for _ in range(15):
        (_, now), grads = gradient(params, key)
        updates, state = step(grads, state)
        params = optax.apply_updates(params, updates)
    for name in ("mel_loss", "f0_loss"):
        assert now[name] < 0.95 * terms[name], name
    (low, _), grads = gradient(params, key, 1, OBJECTIVE, jnp.bfloat16)
    assert bool(jnp.isfinite(low)) and all(bool(jnp.isfinite(leaf).all()) for leaf in grads.values())


def test_bad_objectives_are_refused():
    with pytest.raises(MossError, match="window longer"):
        VocoderObjective(resolutions=((512, 128, 600),))
    with pytest.raises(MossError, match="none, expected some periods"):
        DiscriminatorConfig(periods=(), ffts=())
    assert OBJECTIVE.shortest(CONFIG) == 5

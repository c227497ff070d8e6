"""Filter banks and spectra against librosa, torch and a slow float64 program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.audio import features
from moss_jax.errors import MossError

RNG = np.random.default_rng(0)


def speechlike(samples, seed=0):
    """Bursts of harmonics over faint noise, float32 [samples]."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16000
    voice = sum(np.sin(2 * np.pi * 140 * k * t + k) / k for k in range(1, 20))
    return (0.1 * voice * (np.sin(9 * t) > -0.3) + 1e-3 * rng.normal(size=samples)).astype(np.float32)


@pytest.mark.parametrize("config", [features.LOG_MEL_16K, features.MEL_24K])
def test_mel_filters_are_those_of_librosa(config):
    librosa = pytest.importorskip("librosa")
    theirs = librosa.filters.mel(
        sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.num_mel_bins, fmin=config.fmin, fmax=config.fmax
    )
    np.testing.assert_allclose(features.mel_filters(config), theirs.T, atol=1e-8)


def slow_log_mel(wave, filters):
    padded = np.pad(wave.astype(np.float64), 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([padded[i : i + 400] * window for i in range(0, len(wave), 160)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    x = np.log10(np.maximum(power @ filters, 1e-10))
    return (np.maximum(x, x.max() - 8) + 4) / 4


def test_log_mel_gives_each_clip_what_it_gets_alone():
    waves = [RNG.normal(0, 0.1, samples).astype(np.float32) for samples in (6400, 2560, 1280, 5120)]
    batch = np.zeros((4, 7680), np.float32)
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = wave
    ours = jax.jit(features.log_mel_16k)(batch, jnp.array([len(wave) for wave in waves]))
    assert ours.shape == (4, 48, 128)
    for row, wave in zip(ours, waves, strict=True):
        alone = slow_log_mel(wave, features.mel_filters(features.LOG_MEL_16K).astype(np.float64))
        np.testing.assert_allclose(row[: len(alone)], alone, atol=3e-4)
    together = features.log_mel_16k(batch)
    np.testing.assert_allclose(together[0, :39], ours[0, :39], atol=1e-5)
    assert np.abs(together[0, 39] - ours[0, 39]).max() > 1e-2  # zeros instead of a reflection


def test_log_mel_of_silence():
    np.testing.assert_array_equal(features.log_mel_16k(jnp.zeros((1, 1280))), np.full((1, 8, 128), -1.5, np.float32))


def test_mel_24k_is_that_of_torch():
    torch = pytest.importorskip("torch")
    wave = speechlike(9999)
    padded = torch.nn.functional.pad(torch.tensor(wave)[None, None], (720, 720), mode="reflect")[0]
    window = torch.hann_window(1920)
    spectrum = torch.stft(padded, 1920, 480, 1920, window, center=False, onesided=True, return_complex=True)
    magnitude = torch.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)
    theirs = torch.log(torch.clamp(torch.tensor(features.mel_filters(features.MEL_24K)).T @ magnitude, min=1e-5))
    ours = features.mel_24k(wave[None])
    assert ours.shape == (1, 20, 80)
    np.testing.assert_allclose(ours[0], theirs[0].T, atol=1e-3)
    padded = np.pad(wave, (0, 3000))[None]
    bucketed = jax.jit(features.mel_24k)(padded, jnp.array([len(wave)]))
    np.testing.assert_allclose(bucketed[0, :20], ours[0], atol=1e-4)


def slow_fbank(wave):
    """Kaldi's formula, frame by frame in float64."""
    wave = wave.astype(np.float64)
    rows = []
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    centres = np.linspace(1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 8000 / 700), 82)
    mel = 1127 * np.log(1 + np.arange(256) * 31.25 / 700)
    for start in range(0, len(wave) - 399, 160):
        frame = wave[start : start + 400] - wave[start : start + 400].mean()
        frame = np.array([x - 0.97 * frame[max(i - 1, 0)] for i, x in enumerate(frame)]) * window
        power = np.abs(np.fft.rfft(frame, 512))[:256] ** 2
        row = []
        for low, centre, high in zip(centres, centres[1:], centres[2:], strict=False):
            weights = np.minimum((mel - low) / (centre - low), (high - mel) / (high - centre)).clip(0)
            row.append(np.log(max(weights @ power, 1.1920929e-07)))
        rows.append(row)
    return np.array(rows)


def test_kaldi_fbank_is_the_slow_program():
    wave = speechlike(4000)
    ours = jax.jit(features.kaldi_fbank)(wave[None])
    assert ours.shape == (1, 23, 80)
    np.testing.assert_allclose(ours[0], slow_fbank(wave), atol=3e-3)


def test_mean_normalized_counts_only_valid_frames():
    x = jnp.asarray(RNG.normal(size=(2, 9, 4)).astype(np.float32))
    ours = features.mean_normalized(x, jnp.array([9, 5]))
    np.testing.assert_allclose(ours[0], features.mean_normalized(x[:1])[0], atol=1e-6)
    np.testing.assert_allclose(ours[1, :5], features.mean_normalized(x[1:, :5])[0], atol=1e-6)


@pytest.mark.parametrize(("function", "samples"), [(features.mel_24k, 720), (features.kaldi_fbank, 399)])
def test_too_short(function, samples):
    with pytest.raises(MossError, match=f"a wave of {samples} samples is too short"):
        function(jnp.zeros((1, samples)))
    assert function(jnp.zeros((1, samples + 1))).shape[1] == 1


def test_real_speech(recording):
    """The front ends on a real recording, against the slow programs."""
    from moss_jax.audio import load_audio, resample

    wave = resample(*load_audio(recording("reference_zh.wav")), 16000)[:16000]
    filters = features.mel_filters(features.LOG_MEL_16K).astype(np.float64)
    np.testing.assert_allclose(features.log_mel_16k(wave[None])[0], slow_log_mel(wave, filters), atol=3e-4)
    np.testing.assert_allclose(features.kaldi_fbank(wave[None])[0], slow_fbank(wave), atol=3e-3)

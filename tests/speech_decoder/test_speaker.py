"""CAM++ compared with torch, and padded clips with unpadded ones."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dev.parity import check_golden, read_golden
from moss_jax.audio import load_audio, resample
from moss_jax.audio.features import FBANK_16K, kaldi_fbank, mean_normalized
from moss_jax.checkpoint.config_io import read_config, write_config
from moss_jax.convert.tables.speaker import table
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten, param_shapes, unflatten
from moss_jax.speech_decoder.speaker import (
    CAMPPLUS,
    TINY,
    CAMPPlus,
    SpeakerConfig,
    embed_padded,
    init_params,
    speaker_embedding,
)
from tests.compilations import compilations


@pytest.fixture(scope="module")
def params():
    """Random weights with normalisations that are not the identity."""
    rng = np.random.default_rng(0)
    flat = flatten(jax.jit(lambda: init_params(TINY, jax.random.key(0)))())
    for path, leaf in flat.items():
        if path.endswith(("var", "scale")):
            flat[path] = rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        elif path.endswith(("mean", "bias")):
            flat[path] = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
    return unflatten(flat)


def torch_embedding(weights, config, features):
    """3D-Speaker's CAMPPlus in torch functions: features [1, T, Q] -> [1, E]."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    w = {name: torch.tensor(np.array(value)) for name, value in weights.items()}

    def norm(x, name):
        scale = w.get(f"{name}.weight")
        bias = w.get(f"{name}.bias")
        return f.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], scale, bias)

    x = torch.tensor(np.array(features)).transpose(1, 2)[:, None]
    x = f.relu(norm(f.conv2d(x, w["head.conv1.weight"], padding=1), "head.bn1"))
    for group, blocks in enumerate(config.head_blocks, 1):
        for block in range(blocks):
            name = f"head.layer{group}.{block}"
            stride = (2 - bool(block), 1)
            y = f.relu(norm(f.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            y = norm(f.conv2d(y, w[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if block == 0:
                x = norm(f.conv2d(x, w[f"{name}.shortcut.0.weight"], stride=stride), f"{name}.shortcut.1")
            x = f.relu(x + y)
    x = f.relu(norm(f.conv2d(x, w["head.conv2.weight"], stride=(2, 1), padding=1), "head.bn2")).flatten(1, 2)
    x = f.conv1d(x, w["xvector.tdnn.linear.weight"], stride=2, padding=2)
    x = f.relu(norm(x, "xvector.tdnn.nonlinear.batchnorm"))
    for block, (layers, dilation) in enumerate(zip(config.dense_layers, config.dense_dilations, strict=True), 1):
        for layer in range(1, layers + 1):
            name = f"xvector.block{block}.tdnnd{layer}"
            y = f.conv1d(f.relu(norm(x, f"{name}.nonlinear1.batchnorm")), w[f"{name}.linear1.weight"])
            y = f.relu(norm(y, f"{name}.nonlinear2.batchnorm"))
            name += ".cam_layer"
            size = config.segment_frames
            pooled = f.avg_pool1d(y, size, size, ceil_mode=True).repeat_interleave(size, 2)[..., : y.shape[2]]
            context = y.mean(2, keepdim=True) + pooled
            context = f.relu(f.conv1d(context, w[f"{name}.linear1.weight"], w[f"{name}.linear1.bias"]))
            gate = torch.sigmoid(f.conv1d(context, w[f"{name}.linear2.weight"], w[f"{name}.linear2.bias"]))
            y = f.conv1d(y, w[f"{name}.linear_local.weight"], padding=dilation, dilation=dilation)
            x = torch.cat([x, y * gate], 1)
        name = f"xvector.transit{block}"
        x = f.conv1d(f.relu(norm(x, f"{name}.nonlinear.batchnorm")), w[f"{name}.linear.weight"])
    x = f.relu(norm(x, "xvector.out_nonlinear.batchnorm"))
    x = torch.cat([x.mean(2), x.std(2, unbiased=True)], 1)[..., None]
    return norm(f.conv1d(x, w["xvector.dense.linear.weight"])[..., 0], "xvector.dense.nonlinear.batchnorm").numpy()


@pytest.mark.parametrize("frames", [3, 37, 40])
def test_the_embedding_is_that_of_torch(params, frames):
    features = np.random.default_rng(frames).normal(size=(1, frames, 16)).astype(np.float32)
    theirs = torch_embedding(dict(table(TINY).to_theirs(flatten(params))), TINY, features)
    ours = jax.jit(CAMPPlus(TINY).apply)({"params": params}, features)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-4)
    padded = np.pad(features, ((0, 0), (0, 53 - frames), (0, 0)), constant_values=9)
    masked = jax.jit(CAMPPlus(TINY).apply)({"params": params}, padded, jnp.array([frames]))
    np.testing.assert_allclose(masked, ours, atol=1e-5)


def test_padding_to_a_bucket_does_not_change_the_embedding(params):
    wave = np.random.default_rng(0).normal(0, 0.1, 7777).astype(np.float32)
    features = mean_normalized(kaldi_fbank(wave[None], replace(FBANK_16K, num_mel_bins=16)))
    expected = CAMPPlus(TINY).apply({"params": params}, features)[0]
    np.testing.assert_allclose(speaker_embedding(TINY, params, wave), expected, atol=1e-5)
    with compilations() as compiled:
        speaker_embedding(TINY, params, wave[:5000])
    assert embed_padded.__name__ not in compiled
    with pytest.raises(MossError, match="719 samples at 16 kHz is too short for a speaker embedding"):
        speaker_embedding(TINY, params, wave[:719])
    assert np.isfinite(speaker_embedding(TINY, params, wave[:720])).all()


def test_names_at_full_size():
    found = table(CAMPPLUS).shapes(param_shapes(CAMPPlus(CAMPPLUS), jnp.zeros((1, 8, 80))))
    assert CAMPPLUS.stage_channels == (128, 256, 512, 512)
    assert found["head.conv1.weight"] == (32, 1, 3, 3) and found["head.layer2.0.shortcut.0.weight"] == (32, 32, 1, 1)
    assert found["xvector.tdnn.linear.weight"] == (128, 320, 5)
    assert found["xvector.block3.tdnnd16.linear1.weight"] == (128, 512 + 15 * 32, 1)
    assert found["xvector.block2.tdnnd24.cam_layer.linear_local.weight"] == (32, 128, 3)
    assert found["xvector.block1.tdnnd1.cam_layer.linear1.weight"] == (64, 128, 1)
    assert [found[f"xvector.transit{i}.linear.weight"] for i in (1, 2, 3)] == [
        (256, 512, 1),
        (512, 1024, 1),
        (512, 1024, 1),
    ]
    assert found["xvector.dense.linear.weight"] == (192, 1024, 1)
    assert "xvector.dense.nonlinear.batchnorm.weight" not in found
    # head: convolutions, norms; tdnn; dense layers; transits; the last norm; the last layer
    assert len(found) == (2 + 8 + 2) + (2 + 8 + 2) * 4 + (1 + 4) + 52 * 14 + 3 * (1 + 4) + 4 + (1 + 2)
    assert table(CAMPPLUS).is_carried("head.bn1.num_batches_tracked")


def test_config():
    assert read_config(SpeakerConfig, write_config(CAMPPLUS), "config.json") == CAMPPLUS
    with pytest.raises(MossError, match="num_mel_bins is 81, expected a multiple of 8"):
        replace(CAMPPLUS, num_mel_bins=81)
    with pytest.raises(MossError, match="3 dense_layers and 1 dense_dilations"):
        replace(CAMPPLUS, dense_dilations=(1,))


def test_golden(golden):
    checks = list(check_golden(read_golden(golden("codec/campplus"))))
    assert checks and all(check.passed for check in checks), checks


def test_a_real_voice(recording, params):
    wave = resample(resample(*load_audio(recording("reference_zh.wav")), 24000), 24000, 16000)
    embedding = speaker_embedding(TINY, params, wave)
    assert embedding.shape == (12,) and np.isfinite(embedding).all()

"""Parity of waveforms and features: resampling, 16 kHz log-mel, 24 kHz mel, Kaldi filter banks."""

import jax.numpy as jnp
import numpy as np

from dev.parity.golden import Golden, Mismatch
from moss_jax.audio import features, wave


def _resample(golden: Golden) -> dict:
    config = golden.config
    signal = golden.need("wav")
    _check_config("method", config.get("method"), "sinc_interp_hann")
    _check_weights(golden)
    sizes = {"lowpass_filter_width": config["lowpass_filter_width"], "rolloff": config["rolloff"]}
    return {name: wave.resample(signal, *rates, **sizes) for name, rates in config["cases"].items()}


def _log_mel(golden: Golden) -> dict:
    given = golden.config
    config = features.MelConfig(
        given["sampling_rate"], given["n_fft"], given["hop_length"], given["feature_size"], 0.0, 8000.0
    )
    _check_config("padding", given.get("padding", "longest"), "longest")
    _check_weights(golden, mel_filters=features.mel_filters(config))
    names = sorted((n for n in golden.inputs if n.startswith("wav_")), key=lambda n: int(n[4:]))
    if not names:
        raise Mismatch("input/wav_0 is missing")
    waves = [golden.inputs[name] for name in names]
    multiple = given["pad_to_multiple_of"]
    outputs = {}

    def run(prefix: str, batch: list[np.ndarray]):
        padded = np.zeros((len(batch), -(-max(map(len, batch)) // multiple) * multiple), np.float32)
        for row, one in zip(padded, batch, strict=True):
            row[: len(one)] = one
        mask = np.arange(0, padded.shape[1], config.hop_length) < np.array([len(one) for one in batch])[:, None]
        outputs[f"{prefix}_input_features"] = np.asarray(
            features.log_mel_16k(jnp.asarray(padded), config=config)
        ).swapaxes(1, 2)
        outputs[f"{prefix}_attention_mask"] = mask.astype(np.int32)
        outputs[f"{prefix}_token_mask"] = mask[:, ::2][:, ::4].astype(np.int32)

    run("batch", waves)
    for name, one in zip(names, waves, strict=True):
        run(f"single_{name[4:]}", [one])
    return outputs


def _prompt_mel(golden: Golden) -> dict:
    given = golden.config["mel"]
    _check_config("center", given["center"], False)
    _check_config("win_size", given["win_size"], given["n_fft"])
    config = features.MelConfig(
        given["sampling_rate"], given["n_fft"], given["hop_size"], given["num_mels"], given["fmin"], given["fmax"]
    )
    _check_weights(golden, mel_basis=features.mel_filters(config).T)
    mel = np.asarray(features.mel_24k(jnp.asarray(golden.need("wav")), config=config))
    count = min(mel.shape[1] // 4, golden.config["n_codes"])
    return {"mel": mel.swapaxes(1, 2), "prompt_feat": mel[:, : 4 * count], "token_len": np.array([count], np.int32)}


def _fbank(golden: Golden) -> dict:
    given = golden.config
    fixed = {
        "dither": 0,
        "window": "povey",
        "remove_dc_offset": True,
        "round_to_power_of_two": True,
        "snip_edges": True,
        "use_power": True,
        "use_log": True,
        "use_energy": False,
    }
    for key, value in fixed.items():
        _check_config(key, given.get(key, value), value)
    rate = given["sample_frequency"]
    config = features.FbankConfig(
        sample_rate=rate,
        frame_length=round(rate * given["frame_length"] / 1000),
        frame_shift=round(rate * given["frame_shift"] / 1000),
        num_mel_bins=given["num_mel_bins"],
        low_freq=given["low_freq"],
        high_freq=given["high_freq"],
        preemphasis=given["preemphasis"],
    )
    _check_weights(golden)
    fbank = features.kaldi_fbank(jnp.asarray(golden.need("wav")[None]), config)
    return {"fbank": fbank[0], "fbank_mean_normalized": features.mean_normalized(fbank)[0]}


def _check_config(key: str, value: object, expected: object) -> None:
    if value != expected:
        raise Mismatch(f"config {key} is {value!r}, expected {expected!r}")


def _check_weights(golden: Golden, **expected: np.ndarray) -> None:
    """The file has exactly the expected filter banks as weights, equal to ours to 1e-7."""
    if set(golden.weights) != set(expected):
        raise Mismatch(f"weights {sorted(golden.weights)}, expected {sorted(expected)}")
    for name, ours in expected.items():
        theirs = golden.weights[name]
        if theirs.shape != ours.shape or not np.abs(theirs - ours).max() <= 1e-7:
            raise Mismatch(f"weight/{name} is not the filter bank that the config describes")


COMPONENTS = {
    "codec.resample": _resample,
    "codec.logmel": _log_mel,
    "codec.prompt_mel": _prompt_mel,
    "codec.fbank": _fbank,
}

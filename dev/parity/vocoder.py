"""Parity of the HiFT vocoder."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from dev.parity.golden import Golden
from moss_jax.convert.tables.vocoder import spelling, table
from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.speech_decoder.vocoder import HiFT, VocoderConfig, fold_weight_norm
from moss_jax.speech_decoder.vocoder.stft import stft


def vocoder_config(config: dict) -> VocoderConfig:
    """The reference's constructor arguments as our config."""
    f0 = config["f0_predictor"]
    fft = config["istft_params"]

    def nested(name):
        return tuple(map(tuple, config[name]))

    return VocoderConfig(
        mel_bins=config["in_channels"],
        channels=config["base_channels"],
        sample_rate=config["sampling_rate"],
        upsample_rates=tuple(config["upsample_rates"]),
        upsample_widths=tuple(config["upsample_kernel_sizes"]),
        resblock_widths=tuple(config["resblock_kernel_sizes"]),
        resblock_dilations=nested("resblock_dilation_sizes"),
        source_resblock_widths=tuple(config["source_resblock_kernel_sizes"]),
        source_resblock_dilations=nested("source_resblock_dilation_sizes"),
        fft_size=fft["n_fft"],
        fft_hop=fft["hop_len"],
        f0_channels=f0["cond_channels"],
        harmonics=config["nb_harmonics"] + 1,
        sine_amplitude=config["nsf_alpha"],
        noise_std=config["nsf_sigma"],
        voiced_threshold=config["nsf_voiced_threshold"],
        leaky_slope=config["lrelu_slope"],
        audio_limit=config["audio_limit"],
    )


def load_vocoder(golden: Golden, strip: str = "") -> tuple[VocoderConfig, dict]:
    """The golden's vocoder, folded for running: its config and nested parameters."""
    config = vocoder_config(golden.config["hift"])
    mel = jnp.zeros((1, 2, config.mel_bins))
    noise = jnp.zeros((1, 2 * config.hop, config.harmonics))
    names = [name[len(strip) :] for name in golden.weights if name.startswith(strip)]
    params = golden.params(table(config, spelling(names)), param_shapes(HiFT(config), mel, noise), strip=strip)
    folded = {path: jnp.asarray(leaf) for path, leaf in fold_weight_norm(params).items()}
    return replace(config, weight_norm=False), unflatten(folded)


def runner(config: VocoderConfig, params: dict):
    """HiFT's methods as functions of arrays."""

    def run(*inputs, method: str = "__call__", **keywords):
        def apply(params, inputs, keywords):
            return HiFT(config).apply({"params": params}, *inputs, method=method, **keywords)

        inputs, keywords = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (inputs, keywords))
        with jax.default_matmul_precision("highest"):
            return jax.jit(apply)(params, inputs, keywords)

    return run


def channels_last(x: np.ndarray | jax.Array) -> np.ndarray:
    """[B, C, T] <-> [B, T, C]."""
    return np.swapaxes(np.asarray(x, np.float32), 1, 2)


def vocoder(golden: Golden) -> dict:
    """`HiFTGenerator.inference` with and without a source cache, and its parts: decode, F0, STFT and inverse."""
    config, params = load_vocoder(golden)
    run = runner(config, params)
    inputs = golden.inputs
    results = {}
    if "mel" in inputs:
        mel = channels_last(inputs["mel"])
        results["f0"] = run(mel, method="f0")
        if "sine_noise" in inputs or any(name.startswith(("nocache", "cache")) for name in golden.final):
            noise = golden.need("sine_noise")
            wave, source = run(mel, noise)
            results |= {"nocache_wav": wave, "nocache_source": source[:, None]}
            if "cache_source" in inputs:
                wave, source = run(mel[:1], noise[:1], source_start=inputs["cache_source"][:, 0])
                results |= {"cache_wav": wave, "cache_source_out": source[:, None]}
        if "decode_source" in inputs:
            results["decode_only_wav"] = run(mel[:1], inputs["decode_source"][:, 0], method="decode")
    if "decode_source" in inputs:
        spectrum = stft(jnp.asarray(inputs["decode_source"][:, 0]), config.fft_size, config.fft_hop)
        real, imaginary = jnp.split(channels_last(spectrum), 2, 1)
        results |= {"stft_real": real, "stft_imag": imaginary}
    if "istft_magnitude" in inputs:
        polar = channels_last(inputs["istft_magnitude"]), channels_last(golden.need("istft_phase"))
        results["istft"] = run(*polar, method="inverse")
    return results


COMPONENTS = {"codec.vocoder": vocoder}

"""The losses of the vocoder: STFT at several resolutions, mel, F0, and optionally those of discriminators.

Source: `cosyvoice/hifigan/hifigan.py` of the released code for the terms and their weights; the STFT loss is added:
it alone is enough to train a small vocoder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from moss_jax.audio.features import MelConfig
from moss_jax.errors import MossError
from moss_jax.speech_decoder.vocoder import HiFT, VocoderConfig
from moss_jax.train.speech_decoder.discriminators import (
    DiscriminatorConfig,
    Discriminators,
    discriminator_loss,
    feature_loss,
    generator_loss,
    relativistic_loss,
)
from moss_jax.train.speech_decoder.spectral import log_mel, mel_loss, stft_loss

FLOAT32 = ("f0_", "merge")  # parts of the vocoder that are always float32: phases are sums of their outputs


@dataclass(frozen=True)
class VocoderObjective:
    """Weights of the terms; those of the released code, except for `stft`."""

    mel: float = 45.0
    stft: float = 1.0
    f0: float = 1.0  # of the mean absolute error in Hz; unvoiced frames have 0 Hz
    resolutions: tuple[tuple[int, int, int], ...] = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # samples
    ffts: tuple[int, ...] = (4,)  # sizes of the mel windows, in hops of the mel
    true_f0: float = 0.0  # share of items whose source follows the measured F0, not the predicted one
    discriminators: DiscriminatorConfig | None = None  # None: no adversarial training
    adversarial_from: int = 0  # step; before it the discriminators train without an effect on the generator
    feature: float = 2.0
    relativistic: float = 1.0
    tau: float = 0.04

    def __post_init__(self) -> None:
        for name in ("mel", "stft", "f0", "feature", "relativistic"):
            if getattr(self, name) < 0:
                raise MossError(f"objective: {name} is {getattr(self, name)}, expected 0 or more")
        if any(window > fft for fft, _, window in self.resolutions):
            raise MossError(f"objective: resolutions {self.resolutions} have a window longer than its fft")
        if not 0 <= self.true_f0 <= 1:
            raise MossError(f"objective: true_f0 is {self.true_f0}, expected 0 to 1")

    def shortest(self, config: VocoderConfig) -> int:
        """The minimum number of mel frames of a crop."""
        sizes = [fft for fft, *_ in self.resolutions] + [4 * config.hop]
        sizes += [self.discriminators.shortest] if self.discriminators else []
        return max(sizes) // config.hop + 1


def mel_configs(config: VocoderConfig, ffts: tuple[int, ...] = (4,)) -> tuple[MelConfig, ...]:
    """The mel of the features, and those of other window sizes, up to the highest frequency that the features have."""
    top = min(8000.0, config.sample_rate / 2)
    return tuple(MelConfig(config.sample_rate, fft * config.hop, config.hop, config.mel_bins, 0.0, top) for fft in ffts)


def cast(params: Mapping[str, jax.Array], dtype: Any) -> dict[str, jax.Array]:
    """Flat parameters in the dtype of the forward pass."""
    return {path: leaf if path.startswith(FLOAT32) else leaf.astype(dtype) for path, leaf in params.items()}


def render(
    params: Any, config: VocoderConfig, batch: Mapping[str, jax.Array], key: jax.Array, true_f0: float, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Mel [B, T, M] and measured F0 [B, T] -> (wave float32 [B, hop * T], predicted F0 [B, T])."""
    model = HiFT(config)
    mel = batch["mel"]
    size = (mel.shape[0], mel.shape[1] * config.hop, config.harmonics)
    keys = jax.random.split(key)
    noise = jax.random.normal(keys[0], size)

    def apply(*inputs: jax.Array, method: str) -> Any:
        return model.apply({"params": params}, *inputs, method=method)

    f0 = apply(mel, method="f0")
    measured = jax.random.uniform(keys[1], (mel.shape[0], 1)) < true_f0
    source, _ = apply(jnp.where(measured, batch["f0"], f0), noise, method="source")
    wave = apply(mel.astype(dtype), source.astype(dtype), method="decode")
    return wave.astype(jnp.float32), f0


def losses(
    params: Any,
    discriminators: Any,
    config: VocoderConfig,
    objective: VocoderObjective,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    step: jax.Array,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, its terms), all float32 scalars.

    The one loss is the sum of the generator's and the discriminators': each part treats the parameters of the other as
    constants.

    Args:
        params: of `HiFT`, nested.
        discriminators: parameters of `Discriminators`, nested; not used without discriminators in the objective.
        batch: mel float32 [B, T, M], wave float32 [B, hop * T], f0 float32 [B, T] in Hz.
        step: int32.
    """
    generated, f0 = render(params, config, batch, key, objective.true_f0, dtype)
    real = batch["wave"]
    terms = {
        "mel_loss": mel_loss(real, generated, mel_configs(config, objective.ffts)),
        "stft_loss": stft_loss(real, generated, objective.resolutions),
        "f0_loss": jnp.abs(f0 - batch["f0"]).mean(),
    }
    loss = objective.mel * terms["mel_loss"] + objective.stft * terms["stft_loss"] + objective.f0 * terms["f0_loss"]
    if objective.discriminators is None:
        return loss, terms
    apply: Callable[..., Any] = Discriminators(objective.discriminators).apply
    constant = jax.lax.stop_gradient
    # For the discriminators' losses, the generated wave is constant.
    real_scores = apply({"params": discriminators}, real)
    generated_scores = apply({"params": discriminators}, constant(generated))
    # For the generator's losses, the discriminators are constant.
    real_targets = constant(real_scores)
    generator_scores = apply({"params": constant(discriminators)}, generated)
    tau = objective.tau
    terms |= {
        "generator_loss": generator_loss(generator_scores),
        "feature_loss": feature_loss(real_targets, generator_scores),
        "generator_relative_loss": relativistic_loss(generator_scores, real_targets, tau),
        "discriminator_loss": discriminator_loss(real_scores, generated_scores),
        "discriminator_relative_loss": relativistic_loss(real_scores, generated_scores, tau),
    }
    adversarial = jnp.float32(jnp.asarray(step) >= objective.adversarial_from)
    loss += adversarial * (
        terms["generator_loss"]
        + objective.feature * terms["feature_loss"]
        + objective.relativistic * terms["generator_relative_loss"]
    )
    loss += terms["discriminator_loss"] + objective.relativistic * terms["discriminator_relative_loss"]
    return loss, terms


def mel_distance(generated: jax.Array, real: jax.Array, config: VocoderConfig) -> jax.Array:
    """The mean absolute difference of the log-mels of two waves [B, L], natural logarithm."""
    mel = mel_configs(config)[0]
    return jnp.abs(log_mel(generated, mel) - log_mel(real, mel)).mean()

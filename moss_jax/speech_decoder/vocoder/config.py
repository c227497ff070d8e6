"""Sizes of the HiFT vocoder: an 80-bin log-mel at 50 Hz in, a 24 kHz waveform out."""

from dataclasses import dataclass, field
from math import prod

from moss_jax.checkpoint.config_io import ADDED_LATER, check_sizes
from moss_jax.errors import MossError


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the vocoder; the defaults are the released ones."""

    mel_bins: int = 80
    channels: int = 512  # after the first convolution; each upsampling stage halves them
    sample_rate: int = 24000  # Hz
    upsample_rates: tuple[int, ...] = (8, 5, 3)
    upsample_widths: tuple[int, ...] = (16, 11, 7)  # kernel sizes of the transposed convolutions
    resblock_widths: tuple[int, ...] = (3, 7, 11)  # kernel sizes of the parallel residual blocks of a stage
    resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_resblock_widths: tuple[int, ...] = (7, 7, 11)  # one block for each stage
    source_resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    fft_size: int = 16  # samples, of the predicted STFT and of the source's
    fft_hop: int = 4  # samples
    f0_channels: int = 512
    f0_layers: int = 5
    harmonics: int = 9  # the fundamental included
    sine_amplitude: float = 0.1
    noise_std: float = 0.003  # of the noise added to voiced frames
    voiced_threshold: float = 10.0  # Hz; frames of a lower F0 are unvoiced
    leaky_slope: float = 0.1
    magnitude_limit: float = 100.0  # of the predicted STFT
    audio_limit: float = 0.99  # largest absolute sample
    # True: the prediction is the phase in radians; False: its sine is.
    free_phase: bool = field(default=False, metadata=ADDED_LATER)
    weight_norm: bool = True  # parameters g and v, for storage and training; False: folded kernels, for inference

    def __post_init__(self) -> None:
        check_sizes(self, "vocoder", layers=("f0_layers",))
        stages = len(self.upsample_rates)
        if not len(self.upsample_widths) == len(self.source_resblock_widths) == stages:
            raise MossError(
                "vocoder config: upsample_rates, upsample_widths and source_resblock_widths differ in length"
            )
        if any((w - r) % 2 or w < r for r, w in zip(self.upsample_rates, self.upsample_widths, strict=True)):
            raise MossError("vocoder config: each of upsample_widths must be its rate plus an even number")
        if len(self.source_resblock_dilations) != stages or len(self.resblock_dilations) != len(self.resblock_widths):
            raise MossError("vocoder config: a residual block width lacks its dilations")
        dilations = (*self.resblock_dilations, *self.source_resblock_dilations)
        if not stages or not self.resblock_widths or not all(dilations):
            raise MossError(
                "vocoder config: upsample_rates, resblock_widths and each of the dilations need at least one number"
            )
        if self.fft_size % self.fft_hop or self.fft_size % 2:
            raise MossError("vocoder config: fft_size must be even and a multiple of fft_hop")
        if self.channels % 2**stages:
            raise MossError(f"vocoder config: channels must be a multiple of {2**stages}")

    @property
    def hop(self) -> int:
        """Samples in a mel frame."""
        return prod(self.upsample_rates) * self.fft_hop

    @property
    def f0_reach(self) -> int:
        """Mel frames on either side on which the F0 of a frame depends: one for each convolution, of width 3."""
        return self.f0_layers


RELEASED = VocoderConfig()
TINY = VocoderConfig(
    channels=32,
    f0_channels=16,
    f0_layers=2,
    resblock_widths=(3, 5),
    resblock_dilations=((1, 3), (1, 2)),
    source_resblock_widths=(3, 3, 5),
    source_resblock_dilations=((1,), (1, 2), (1,)),
)

"""Sizes of the flow-matching decoder: codes at 12.5 Hz and a voice in, an 80-bin log-mel at 50 Hz out."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from moss_jax.checkpoint.config_io import ADDED_LATER, check_sizes
from moss_jax.errors import MossError

if TYPE_CHECKING:
    import jax

Array = TypeVar("Array", np.ndarray, "jax.Array")


@dataclass(frozen=True)
class EncoderConfig:
    """The upsampling conformer (self-attention and feed-forward only, no convolution module)."""

    hidden_size: int = 512
    num_heads: int = 8
    intermediate_size: int = 2048
    num_layers: int = 6  # at the rate of the codes
    num_up_layers: int = 4  # at the rate of the mel; a constant in the reference

    def __post_init__(self) -> None:
        check_sizes(self, "flow.encoder", layers=("num_layers", "num_up_layers"))
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise MossError(
                f"flow.encoder config: hidden_size {self.hidden_size} is not an even multiple of {self.num_heads} heads"
            )


@dataclass(frozen=True)
class EstimatorConfig:
    """The velocity estimator: one down stage, `num_mid_stages` middle stages, one up stage, all at the mel's rate."""

    channels: int = 256
    num_heads: int = 8
    head_dim: int = 64
    num_blocks: int = 4  # transformer blocks in a stage
    num_mid_stages: int = 12
    intermediate_size: int = 1024  # of a transformer block
    time_size: int = 1024  # of the time embedding

    def __post_init__(self) -> None:
        check_sizes(self, "flow.estimator", layers=("num_blocks", "num_mid_stages"))

    @property
    def num_stages(self) -> int:
        return self.num_mid_stages + 2

    @property
    def num_layers(self) -> int:
        """Attention layers in all stages together."""
        return self.num_stages * self.num_blocks


@dataclass(frozen=True)
class FlowConfig:
    vocab_size: int = 20480  # rows of the embedding table
    codebook_size: int = 16384  # codes 0..codebook_size-1 are speech; the other rows are unused
    mel_bins: int = 80
    speaker_size: int = 192  # of the speaker embedding
    frames_per_code: int = 4  # mel frames
    lookahead: int = 3  # codes after a code that the encoder of it sees
    chunk: int = 25  # codes; the static chunk of the attention masks in streaming
    euler_steps: int = 10
    guidance: float = 0.7  # classifier-free guidance rate: v = (1 + g) v_conditional - g v_unconditional
    noise_frames: int = 15000  # mel frames of the fixed noise: the maximum of prompt and speech together
    mel_mean: float = field(default=0.0, metadata=ADDED_LATER)  # the flow works on (mel - mel_mean) / mel_std
    mel_std: float = field(default=1.0, metadata=ADDED_LATER)
    # What the estimator predicts: the velocity, or the difference between the mel and the encoder's projection, from
    # which the velocity follows (`sampler.as_velocity`).
    predicts: Literal["velocity", "mel"] = field(default="velocity", metadata=ADDED_LATER)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)

    def __post_init__(self) -> None:
        check_sizes(self, "flow", zero=("lookahead",), layers=("euler_steps", "frames_per_code"))
        if self.codebook_size > self.vocab_size:
            raise MossError(
                f"flow config: codebook_size {self.codebook_size} is more than the {self.vocab_size} rows of vocab_size"
            )
        if not self.mel_std > 0:
            raise MossError(f"flow config: mel_std is {self.mel_std}, expected above 0")

    @property
    def rows(self) -> int:
        """Rows of the estimator for each item: with guidance there is an unconditional one as well."""
        return 2 if self.guidance else 1

    @property
    def max_codes(self) -> int:
        """The maximum number of codes of prompt and speech together."""
        return self.noise_frames // self.frames_per_code

    @property
    def chunk_frames(self) -> int:
        """Mel frames in a chunk."""
        return self.chunk * self.frames_per_code

    def normalized(self, mel: Array) -> Array:
        """A log-mel in the units of the flow."""
        return (mel - self.mel_mean) / self.mel_std

    def denormalized(self, x: Array) -> Array:
        """The log-mel of an output of the flow."""
        return x * self.mel_std + self.mel_mean

    @property
    def estimator_inputs(self) -> int:
        """Channels that enter the estimator: state, mu, speaker and prompt mel; also the size of the time sinusoids."""
        return 4 * self.mel_bins


RELEASED = FlowConfig()  # flow.pt
RELEASED_CHUNK_5 = FlowConfig(chunk=5)  # flow-chunk-5.pt

TINY = FlowConfig(
    vocab_size=96,
    codebook_size=90,
    mel_bins=8,
    speaker_size=12,
    chunk=5,
    noise_frames=1200,
    encoder=EncoderConfig(hidden_size=32, num_heads=4, intermediate_size=64, num_layers=2, num_up_layers=2),
    estimator=EstimatorConfig(
        channels=16, num_heads=2, head_dim=8, num_blocks=2, num_mid_stages=2, intermediate_size=32, time_size=64
    ),
)

"""Sizes of the speech tokenizer."""

from dataclasses import dataclass

from moss_jax.audio.features import MelConfig
from moss_jax.checkpoint.config_io import check_sizes
from moss_jax.errors import MossError


@dataclass(frozen=True)
class SpeechTokenizerConfig:
    """Sizes of the causal Whisper-VQ encoder and its quantiser; with the names of the released config.json where it has
    the same fields."""

    sample_rate: int  # Hz, of the waves that are encoded
    n_fft: int  # samples of a log-mel frame
    hop_length: int  # samples from frame to frame
    num_mel_bins: int  # M
    d_model: int  # D, width of the encoder
    num_layers: int  # L, layers before the quantiser
    encoder_attention_heads: int  # N; the head size is D / N
    encoder_ffn_dim: int  # F
    max_source_positions: int  # encoder frames, of two log-mel frames each, in a segment
    pooling_kernel_size: int  # encoder frames averaged into one code
    quantize_vocab_size: int  # codes
    code_dim: int  # size of a code's vector; if it is not D, a projection precedes the quantiser
    normalize_codes: bool  # compare directions (unit vectors) instead of vectors
    layer_norm_epsilon: float

    def __post_init__(self) -> None:
        check_sizes(self, "speech tokenizer", layers=("num_layers",))
        if self.d_model % self.encoder_attention_heads:
            raise MossError(
                f"speech tokenizer config: d_model {self.d_model} is not a multiple of encoder_attention_heads "
                f"{self.encoder_attention_heads}"
            )
        if self.max_source_positions % self.pooling_kernel_size:
            raise MossError(
                f"speech tokenizer config: max_source_positions {self.max_source_positions} is not a multiple of "
                f"pooling_kernel_size {self.pooling_kernel_size}"
            )

    @property
    def mel(self) -> MelConfig:
        return MelConfig(self.sample_rate, self.n_fft, self.hop_length, self.num_mel_bins, 0.0, self.sample_rate / 2)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.encoder_attention_heads

    @property
    def frames_per_code(self) -> int:
        """Log-mel frames in a code (8: the second convolution halves the rate, pooling divides it by 4)."""
        return 2 * self.pooling_kernel_size

    @property
    def samples_per_code(self) -> int:
        return self.frames_per_code * self.hop_length

    @property
    def codes_per_segment(self) -> int:
        return self.max_source_positions // self.pooling_kernel_size

    @property
    def samples_per_segment(self) -> int:
        return self.codes_per_segment * self.samples_per_code

    @property
    def code_rate(self) -> float:
        """Codes per second."""
        return self.sample_rate / self.samples_per_code


MOSS_SPEECH_CODEC = SpeechTokenizerConfig(
    sample_rate=16000,
    n_fft=400,
    hop_length=160,
    num_mel_bins=128,
    d_model=1280,
    num_layers=16,
    encoder_attention_heads=20,
    encoder_ffn_dim=5120,
    max_source_positions=1500,
    pooling_kernel_size=4,
    quantize_vocab_size=16384,
    code_dim=1280,
    normalize_codes=False,
    layer_norm_epsilon=1e-5,
)

TINY = SpeechTokenizerConfig(
    sample_rate=16000,
    n_fft=400,
    hop_length=160,
    num_mel_bins=128,
    d_model=32,
    num_layers=3,
    encoder_attention_heads=2,
    encoder_ffn_dim=64,
    max_source_positions=60,  # segments of 1.2 s, so that short tests cross their boundaries
    pooling_kernel_size=4,
    quantize_vocab_size=96,
    code_dim=32,
    normalize_codes=False,
    layer_norm_epsilon=1e-5,
)

"""Configs of the released codec, in both directions.

Sizes are read off the tensor shapes. Other values come from `flow/config.yaml`, or are the released defaults where that
file does not have them.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moss_jax.checkpoint.config_io import read_config, within
from moss_jax.convert.tables.vocoder import Spelling
from moss_jax.documents import read_yaml
from moss_jax.errors import MossError
from moss_jax.speech_decoder.flow.config import EncoderConfig, EstimatorConfig, FlowConfig
from moss_jax.speech_decoder.vocoder import VocoderConfig
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig

Shapes = Mapping[str, tuple[int, ...]]
Config = TypeVar("Config", FlowConfig, VocoderConfig)
MAX_SAMPLE_RATE = 768_000  # Hz
FLOW_DEFAULTS = FlowConfig()
VOCODER_DEFAULTS = VocoderConfig()


# The classes below have the structure and keys of the released `flow/config.yaml`; only values that are used.


@dataclass(frozen=True)
class _YamlEstimator:
    num_heads: int = within(1, 1024, FLOW_DEFAULTS.estimator.num_heads)


@dataclass(frozen=True)
class _YamlCfmValues:
    inference_cfg_rate: float = within(0, 100, FLOW_DEFAULTS.guidance)


@dataclass(frozen=True)
class _YamlCfmParams:
    content: _YamlCfmValues = _YamlCfmValues()


@dataclass(frozen=True)
class _YamlDecoder:
    cfm_params: _YamlCfmParams = _YamlCfmParams()
    estimator: _YamlEstimator = _YamlEstimator()


@dataclass(frozen=True)
class _YamlFlow:
    decoder: _YamlDecoder = _YamlDecoder()


@dataclass(frozen=True)
class _YamlIstft:
    hop_len: int = within(1, 4096, VOCODER_DEFAULTS.fft_hop)


@dataclass(frozen=True)
class _YamlHift:
    sampling_rate: int = within(1000, MAX_SAMPLE_RATE, VOCODER_DEFAULTS.sample_rate)
    upsample_rates: tuple[int, ...] = within(1, 1024, VOCODER_DEFAULTS.upsample_rates)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = within(1, 1024, VOCODER_DEFAULTS.resblock_dilations)
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...] = within(
        1, 1024, VOCODER_DEFAULTS.source_resblock_dilations
    )
    istft_params: _YamlIstft = _YamlIstft()
    nsf_alpha: float = within(0, 100, VOCODER_DEFAULTS.sine_amplitude)
    nsf_sigma: float = within(0, 100, VOCODER_DEFAULTS.noise_std)
    nsf_voiced_threshold: float = within(0, MAX_SAMPLE_RATE, VOCODER_DEFAULTS.voiced_threshold)
    lrelu_slope: float = within(0, 1, VOCODER_DEFAULTS.leaky_slope)
    audio_limit: float = within(1e-3, 1000, VOCODER_DEFAULTS.audio_limit)


@dataclass(frozen=True)
class ReleasedYaml:
    """The values that are used from `flow/config.yaml`; the defaults are the released values."""

    flow: _YamlFlow = _YamlFlow()
    hift: _YamlHift = _YamlHift()


def read_released_yaml(path: Path) -> ReleasedYaml:
    """Reads a `flow/config.yaml`.

    Raises:
        MossError: the file cannot be read, or the full list of values with a wrong type or out of range.
    """
    return read_config(ReleasedYaml, read_yaml(path), path, foreign=True)


def flow_config(shapes: Shapes, yaml: ReleasedYaml, codebook_size: int, where: str) -> FlowConfig:
    """The flow's config from the shapes of `flow.pt`.

    Args:
        shapes: {name: shape} of its tensors.
        yaml: values of flow/config.yaml, or the defaults.
        codebook_size: number of codes of the speech tokenizer.
        where: start of error messages.

    Raises:
        MossError: tensors are missing, or shapes and yaml contradict each other.
    """
    estimator = "decoder.estimator."
    shape_of = _ShapeReader(shapes, where)
    vocab, width = shape_of("input_embedding.weight", 2)
    mel_bins, speaker = shape_of("spk_embed_affine_layer.weight", 2)
    layer = "encoder.encoders.0."
    inner = shape_of(f"{estimator}down_blocks.0.1.0.attn1.to_q.weight", 2)[0]
    heads = yaml.flow.decoder.estimator.num_heads
    if inner % heads:
        raise MossError(f"{where}: attention width {inner} of the estimator does not divide into {heads} heads")
    sizes = dict(
        vocab_size=vocab,
        codebook_size=codebook_size,
        mel_bins=mel_bins,
        speaker_size=speaker,
        frames_per_code=(shape_of("encoder.up_layer.conv.weight", 3)[2] - 1) // 2,
        lookahead=shape_of("encoder.pre_lookahead_layer.conv1.weight", 3)[2] - 1,
        guidance=yaml.flow.decoder.cfm_params.content.inference_cfg_rate,
        encoder=EncoderConfig(
            hidden_size=width,
            num_heads=shape_of(f"{layer}self_attn.pos_bias_u", 2)[0],
            intermediate_size=shape_of(f"{layer}feed_forward.w_1.weight", 2)[0],
            num_layers=_count(shapes, "encoder.encoders."),
            num_up_layers=_count(shapes, "encoder.up_encoders."),
        ),
        estimator=EstimatorConfig(
            channels=shape_of(f"{estimator}final_proj.weight", 3)[1],
            num_heads=heads,
            head_dim=inner // heads,
            num_blocks=_count(shapes, f"{estimator}down_blocks.0.1."),
            num_mid_stages=_count(shapes, f"{estimator}mid_blocks."),
            intermediate_size=shape_of(f"{estimator}down_blocks.0.1.0.ff.net.0.proj.weight", 2)[0],
            time_size=shape_of(f"{estimator}time_mlp.linear_1.weight", 2)[0],
        ),
    )
    return _build(FlowConfig, sizes, where)


def vocoder_config(shapes: Shapes, spelling: Spelling, yaml: ReleasedYaml, where: str) -> VocoderConfig:
    """The vocoder's config from the shapes of `hift.pt`; rates and dilations are in `yaml` only. See `flow_config`."""
    hift = yaml.hift
    shape_of = _ShapeReader({name.removeprefix(spelling.prefix): shape for name, shape in shapes.items()}, where)
    channels, mel_bins, _ = shape_of(f"conv_pre.{spelling.v}", 3)
    stages = _count(shape_of.shapes, "ups.")
    blocks = _count(shape_of.shapes, "resblocks.") // max(stages, 1)
    sizes = dict(
        mel_bins=mel_bins,
        channels=channels,
        sample_rate=hift.sampling_rate,
        upsample_rates=hift.upsample_rates,
        upsample_widths=tuple(shape_of(f"ups.{i}.{spelling.v}", 3)[2] for i in range(stages)),
        resblock_widths=tuple(shape_of(f"resblocks.{i}.convs1.0.{spelling.v}", 3)[2] for i in range(blocks)),
        resblock_dilations=hift.resblock_dilation_sizes,
        source_resblock_widths=tuple(
            shape_of(f"source_resblocks.{i}.convs1.0.{spelling.v}", 3)[2] for i in range(stages)
        ),
        source_resblock_dilations=hift.source_resblock_dilation_sizes,
        fft_size=shape_of("conv_post.bias", 1)[0] - 2,
        fft_hop=hift.istft_params.hop_len,
        f0_channels=shape_of("f0_predictor.classifier.weight", 2)[1],
        f0_layers=_count(shape_of.shapes, "f0_predictor.condnet."),
        harmonics=shape_of("m_source.l_linear.weight", 2)[1],
        sine_amplitude=hift.nsf_alpha,
        noise_std=hift.nsf_sigma,
        voiced_threshold=hift.nsf_voiced_threshold,
        leaky_slope=hift.lrelu_slope,
        audio_limit=hift.audio_limit,
    )
    return _build(VocoderConfig, sizes, where)


def released_tokenizer_config(config: SpeechTokenizerConfig) -> dict[str, Any]:
    """The released codec's config.json. Raises MossError for a tokenizer that its keys cannot describe."""
    if config.code_dim != config.d_model or config.normalize_codes:
        raise MossError(
            "speech tokenizer: the released layout has no field for a projected or normalised codebook; "
            "only code_dim = d_model and normalize_codes = false can be exported"
        )
    names = (
        "d_model",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "num_mel_bins",
        "max_source_positions",
        "pooling_kernel_size",
        "quantize_vocab_size",
    )
    return {
        "architectures": ["WhisperVQEncoder"],
        **{name: getattr(config, name) for name in names},
        "quantize_position": config.num_layers,
        "pooling_position": config.num_layers,
        "encoder_layers": config.num_layers,
        "pooling_type": "avg",
        "activation_function": "gelu",
        "encoder_causal_attention": True,
        "encoder_causal_convolution": True,
        "quantize_encoder_only": True,
    }


def released_yaml(flow: FlowConfig, vocoder: VocoderConfig) -> str:
    """A `flow/config.yaml` with the values that `flow_config` and `vocoder_config` read."""
    dilations = [list(x) for x in vocoder.resblock_dilations]
    source_dilations = [list(x) for x in vocoder.source_resblock_dilations]
    return f"""\
sample_rate: {vocoder.sample_rate}
flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    input_size: {flow.encoder.hidden_size}
    output_size: {flow.mel_bins}
    vocab_size: {flow.vocab_size}
    token_mel_ratio: {flow.frames_per_code}
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        cfm_params: !new:omegaconf.DictConfig
            content:
                inference_cfg_rate: {flow.guidance}
        estimator: !new:cosyvoice.flow.decoder.CausalConditionalDecoder
            num_heads: {flow.estimator.num_heads}
            attention_head_dim: {flow.estimator.head_dim}
hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    sampling_rate: !ref <sample_rate>
    nsf_alpha: {vocoder.sine_amplitude}
    nsf_sigma: {vocoder.noise_std}
    nsf_voiced_threshold: {vocoder.voiced_threshold}
    upsample_rates: {list(vocoder.upsample_rates)}
    istft_params:
        n_fft: {vocoder.fft_size}
        hop_len: {vocoder.fft_hop}
    resblock_dilation_sizes: {dilations}
    source_resblock_dilation_sizes: {source_dilations}
    lrelu_slope: {vocoder.leaky_slope}
    audio_limit: {vocoder.audio_limit}
"""


def _count(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix` in the names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


class _ShapeReader:
    """Shapes by name and rank. Raises MossError if a tensor is missing or has another rank."""

    def __init__(self, shapes: Shapes, where: str) -> None:
        self.shapes = shapes
        self._where = where

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None:
            raise MossError(f"{self._where}: tensor {name} is missing; is this the right file?")
        if len(shape) != rank or not math.prod(shape):
            raise MossError(f"{self._where}: tensor {name} is {list(shape)}, expected {rank} dimensions")
        return tuple(shape)


def _build(cls: type[Config], sizes: dict[str, Any], where: str) -> Config:
    """The config. Raises MossError if its own checks refuse the sizes."""
    try:
        return cls(**sizes)
    except (ValueError, TypeError) as error:
        raise MossError(f"{where}: its tensors and flow/config.yaml contradict each other: {error}") from error

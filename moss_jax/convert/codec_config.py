"""Configs of the released codec: sizes from the shapes of the tensors, the rest from `flow/config.yaml` where it says
something and from the released defaults where it does not. And back, for systems that were not imported."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jax.checkpoint.config_io import read_config, within
from moss_jax.convert.tables.vocoder import Spelling
from moss_jax.documents import read_yaml
from moss_jax.errors import MossError
from moss_jax.speech_decoder.flow.config import EncoderConfig, EstimatorConfig, FlowConfig
from moss_jax.speech_decoder.vocoder import VocoderConfig
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig

Shapes = Mapping[str, tuple[int, ...]]
MAX_RATE = 768_000  # Hz
FLOW = FlowConfig()
VOCODER = VocoderConfig()


# The classes below have the structure and the keys of the released `flow/config.yaml`, as far as values are used.


@dataclass(frozen=True)
class _Estimator:
    num_heads: int = within(1, 1024, FLOW.estimator.num_heads)


@dataclass(frozen=True)
class _CfmValues:
    inference_cfg_rate: float = within(0, 100, FLOW.guidance)


@dataclass(frozen=True)
class _CfmParams:
    content: _CfmValues = _CfmValues()


@dataclass(frozen=True)
class _Decoder:
    cfm_params: _CfmParams = _CfmParams()
    estimator: _Estimator = _Estimator()


@dataclass(frozen=True)
class _Flow:
    decoder: _Decoder = _Decoder()


@dataclass(frozen=True)
class _Istft:
    hop_len: int = within(1, 4096, VOCODER.fft_hop)


@dataclass(frozen=True)
class _Hift:
    sampling_rate: int = within(1000, MAX_RATE, VOCODER.sample_rate)
    upsample_rates: tuple[int, ...] = within(1, 1024, VOCODER.upsample_rates)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = within(1, 1024, VOCODER.resblock_dilations)
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...] = within(1, 1024, VOCODER.source_resblock_dilations)
    istft_params: _Istft = _Istft()
    nsf_alpha: float = within(0, 100, VOCODER.sine_amplitude)
    nsf_sigma: float = within(0, 100, VOCODER.noise_std)
    nsf_voiced_threshold: float = within(0, MAX_RATE, VOCODER.voiced_threshold)
    lrelu_slope: float = within(0, 1, VOCODER.leaky_slope)
    audio_limit: float = within(1e-3, 1000, VOCODER.audio_limit)


@dataclass(frozen=True)
class ReleasedYaml:
    """What is used of `flow/config.yaml`; the defaults are the released values."""

    flow: _Flow = _Flow()
    hift: _Hift = _Hift()


def read_released_yaml(path: Path) -> ReleasedYaml:
    """The values that are used of a `flow/config.yaml`.

    Raises:
        MossError: it cannot be read, or values in it have the wrong type or are out of range: all of them.
    """
    return read_config(ReleasedYaml, read_yaml(path), path, foreign=True)


def flow_config(shapes: Shapes, yaml: ReleasedYaml, codebook_size: int, where: str) -> FlowConfig:
    """The flow's config from the shapes of `flow.pt`.

    Args:
        shapes: of its tensors.
        yaml: of flow/config.yaml, or the defaults where there is none.
        codebook_size: codes of the speech tokenizer.
        where: opens the error message.
    """
    estimator = "decoder.estimator."
    look = _Shapes(shapes, where)
    vocab, width = look("input_embedding.weight", 2)
    mel_bins, speaker = look("spk_embed_affine_layer.weight", 2)
    layer = "encoder.encoders.0."
    inner = look(f"{estimator}down_blocks.0.1.0.attn1.to_q.weight", 2)[0]
    heads = yaml.flow.decoder.estimator.num_heads
    if inner % heads:
        raise MossError(f"{where}: attention width {inner} of the estimator does not divide into {heads} heads")
    sizes = dict(
        vocab_size=vocab,
        codebook_size=codebook_size,
        mel_bins=mel_bins,
        speaker_size=speaker,
        frames_per_code=(look("encoder.up_layer.conv.weight", 3)[2] - 1) // 2,
        lookahead=look("encoder.pre_lookahead_layer.conv1.weight", 3)[2] - 1,
        guidance=yaml.flow.decoder.cfm_params.content.inference_cfg_rate,
        encoder=EncoderConfig(
            hidden_size=width,
            num_heads=look(f"{layer}self_attn.pos_bias_u", 2)[0],
            intermediate_size=look(f"{layer}feed_forward.w_1.weight", 2)[0],
            num_layers=count(shapes, "encoder.encoders."),
            num_up_layers=count(shapes, "encoder.up_encoders."),
        ),
        estimator=EstimatorConfig(
            channels=look(f"{estimator}final_proj.weight", 3)[1],
            num_heads=heads,
            head_dim=inner // heads,
            num_blocks=count(shapes, f"{estimator}down_blocks.0.1."),
            num_mid_stages=count(shapes, f"{estimator}mid_blocks."),
            intermediate_size=look(f"{estimator}down_blocks.0.1.0.ff.net.0.proj.weight", 2)[0],
            time_size=look(f"{estimator}time_mlp.linear_1.weight", 2)[0],
        ),
    )
    return _located(FlowConfig, sizes, where)


def vocoder_config(shapes: Shapes, spelling: Spelling, yaml: ReleasedYaml, where: str) -> VocoderConfig:
    """The vocoder's config from the shapes of `hift.pt`; rates and dilations cannot be seen in them."""
    hift = yaml.hift
    look = _Shapes({name.removeprefix(spelling.prefix): shape for name, shape in shapes.items()}, where)
    channels, mel_bins, _ = look(f"conv_pre.{spelling.v}", 3)
    stages = count(look.shapes, "ups.")
    blocks = count(look.shapes, "resblocks.") // max(stages, 1)
    sizes = dict(
        mel_bins=mel_bins,
        channels=channels,
        sample_rate=hift.sampling_rate,
        upsample_rates=hift.upsample_rates,
        upsample_widths=tuple(look(f"ups.{i}.{spelling.v}", 3)[2] for i in range(stages)),
        resblock_widths=tuple(look(f"resblocks.{i}.convs1.0.{spelling.v}", 3)[2] for i in range(blocks)),
        resblock_dilations=hift.resblock_dilation_sizes,
        source_resblock_widths=tuple(look(f"source_resblocks.{i}.convs1.0.{spelling.v}", 3)[2] for i in range(stages)),
        source_resblock_dilations=hift.source_resblock_dilation_sizes,
        fft_size=look("conv_post.bias", 1)[0] - 2,
        fft_hop=hift.istft_params.hop_len,
        f0_channels=look("f0_predictor.classifier.weight", 2)[1],
        f0_layers=count(look.shapes, "f0_predictor.condnet."),
        harmonics=look("m_source.l_linear.weight", 2)[1],
        sine_amplitude=hift.nsf_alpha,
        noise_std=hift.nsf_sigma,
        voiced_threshold=hift.nsf_voiced_threshold,
        leaky_slope=hift.lrelu_slope,
        audio_limit=hift.audio_limit,
    )
    return _located(VocoderConfig, sizes, where)


def released_tokenizer_config(config: SpeechTokenizerConfig) -> dict[str, Any]:
    """The keys of the released codec's config.json. Raises MossError when it has no key for what ours is."""
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
    """A `flow/config.yaml` with the values that `flow_config` and `vocoder_config` look for there."""
    lists = {
        key: [list(x) for x in getattr(vocoder, key)] for key in ("resblock_dilations", "source_resblock_dilations")
    }
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
    resblock_dilation_sizes: {lists["resblock_dilations"]}
    source_resblock_dilation_sizes: {lists["source_resblock_dilations"]}
    lrelu_slope: {vocoder.leaky_slope}
    audio_limit: {vocoder.audio_limit}
"""


def count(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix` in the names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


class _Shapes:
    """Shapes by name; one that is not there or has another rank is a readable error."""

    def __init__(self, shapes: Shapes, where: str):
        self.shapes = shapes
        self._where = where

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None:
            raise MossError(f"{self._where}: tensor {name} is missing; is this the file that its name says?")
        if len(shape) != rank or not math.prod(shape):
            raise MossError(f"{self._where}: tensor {name} is {list(shape)}, expected {rank} dimensions")
        return tuple(shape)


def _located(cls: type, sizes: dict[str, Any], where: str) -> Any:
    try:
        return cls(**sizes)
    except (ValueError, TypeError) as error:
        raise MossError(f"{where}: its tensors and flow/config.yaml contradict each other: {error}") from error

"""The speech decoder as a component of a system: its flows, its vocoder and its speaker network."""

from collections.abc import Callable, Mapping
from functools import partial

from moss_jax.checkpoint.component import Component, Shapes
from moss_jax.speech_decoder.config import SpeechDecoderConfig, flow_stem
from moss_jax.speech_decoder.flow.model import flow_shapes
from moss_jax.speech_decoder.speaker import speaker_shapes
from moss_jax.speech_decoder.vocoder import vocoder_shapes


def _files(config: SpeechDecoderConfig) -> Mapping[str, Callable[[], Shapes]]:
    flows = [flow_stem(), *(flow_stem(chunk) for chunk in config.chunks)]
    files: dict[str, Callable[[], Shapes]] = {stem: partial(flow_shapes, config.flow) for stem in flows}
    files["vocoder"] = partial(vocoder_shapes, config.vocoder)
    if config.speaker is not None:
        files["speaker"] = partial(speaker_shapes, config.speaker)
    return files


def _code_count(config: SpeechDecoderConfig) -> int:
    return config.flow.codebook_size


SPEECH_DECODER = Component(
    name="speech_decoder",
    title="speech decoder",
    config_type=SpeechDecoderConfig,
    files=_files,
    code_count=_code_count,
    dtype="float32",  # the dtype of the computation; the files may have fewer bits
)

"""Sizes of the whole speech decoder: codes at 12.5 Hz in, 24 kHz speech out."""

from dataclasses import dataclass, field, replace
from math import isclose

from moss_jax.checkpoint.config_io import check_sizes
from moss_jax.errors import MossError
from moss_jax.speech_decoder import speaker
from moss_jax.speech_decoder.flow import config as flow
from moss_jax.speech_decoder.flow.config import FlowConfig
from moss_jax.speech_decoder.speaker import CAMPPLUS, SpeakerConfig
from moss_jax.speech_decoder.vocoder import config as vocoder
from moss_jax.speech_decoder.vocoder.config import VocoderConfig


@dataclass(frozen=True)
class SpeechDecoderConfig:
    """Sizes of all parts; the defaults are the released ones."""

    flow: FlowConfig = field(default_factory=FlowConfig)
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)
    speaker: SpeakerConfig | None = CAMPPLUS  # None: no speaker network, the flow has one voice
    chunks: tuple[int, ...] = (5, 25)  # codes; chunk sizes with weights for streaming, the default first
    code_rate: float = 12.5  # codes per second
    mel_overlap: int = 8  # mel frames that a stream holds back, because the vocoder looks ahead
    mel_context: int = 12  # mel frames before a piece, the held back ones included, that a stream vocodes again

    def __post_init__(self) -> None:
        check_sizes(self, "speech decoder", zero=("mel_overlap", "mel_context"))
        flow = self.flow.mel_bins
        vocoder = self.vocoder.mel_bins
        if flow != vocoder:
            raise MossError(f"speech decoder config: flow.mel_bins is {flow}, vocoder.mel_bins is {vocoder}")
        if self.speaker is not None and self.speaker.embedding_size != self.flow.speaker_size:
            raise MossError(
                f"speech decoder config: speaker.embedding_size is {self.speaker.embedding_size}, "
                f"flow.speaker_size is {self.flow.speaker_size}"
            )
        if not isclose(self.code_rate * self.samples_per_code, self.sample_rate):
            raise MossError(
                f"speech decoder config: {self.code_rate} codes a second of {self.samples_per_code} samples do not "
                f"make vocoder.sample_rate, {self.sample_rate}"
            )

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.vocoder.sample_rate

    @property
    def samples_per_code(self) -> int:
        return self.flow.frames_per_code * self.vocoder.hop

    def streaming(self, chunk: int | None = None) -> tuple[str, FlowConfig]:
        """The flow of a stream: `flow_stem` of its parameters, and its config.

        Args:
            chunk: codes in a chunk; None: the default. Without weights for streaming, those of offline decoding are
                used.

        Raises:
            MossError: there are no weights for this chunk size.
        """
        if not self.chunks and chunk in (None, self.flow.chunk):
            return flow_stem(), self.flow
        chunk = self.chunks[0] if chunk is None else chunk
        if chunk not in self.chunks:
            known = ", ".join(map(str, self.chunks or (self.flow.chunk,)))
            raise MossError(f"streaming: no flow for chunks of {chunk} codes, there is one for: {known}")
        return flow_stem(chunk), replace(self.flow, chunk=chunk)


def flow_stem(chunk: int | None = None) -> str:
    """Name of the flow's parameters, on disk and in memory: offline (None), or for streams with this chunk size."""
    return "flow" if chunk is None else f"flow_chunk_{chunk}"


RELEASED = SpeechDecoderConfig()
TINY = SpeechDecoderConfig(
    flow=flow.TINY,
    vocoder=replace(vocoder.TINY, mel_bins=flow.TINY.mel_bins),
    speaker=speaker.TINY,
    chunks=(flow.TINY.chunk,),
)

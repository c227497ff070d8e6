"""A run that trains a speech tokenizer."""

from dataclasses import dataclass
from typing import ClassVar

from moss_jax.errors import MossError
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.train.run import RANDOM, BaseRun

HEADS = ("ctc", "attention")
UNITS = ("words", "characters", "whisper")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the codes are trained for. None of these networks is part of the exported speech tokenizer."""

    head: str = "ctc"  # "ctc", or "attention": Whisper's decoder
    units: str = "words"  # of the transcripts: "words", "characters", or "whisper": those of its tokenizer.json
    vocabulary: int = 8192  # maximum number of units; rarer words are one unit, "unknown"
    layers: int = 2  # after the quantiser; bidirectional over the whole clip
    decoder_layers: int = 2  # of "attention"
    max_units: int = 448  # of "attention": longest transcript in units, with its begin and end
    prompt: tuple[int, ...] = ()  # of "whisper": units before each transcript (language, task); not in the loss
    asr_weight: float = 1.0
    mel_weight: float = 1.0  # of the reconstruction of the log-mel from the codes
    mel_hidden: int = 256  # width of the network that reconstructs it
    commitment_weight: float = 0.25
    commitment_from: int = 200  # step; the weight is 0 before it
    ema_decay: float = 0.99  # of the moving averages of the codebook; lower at first, see the step
    restart_below: float = 0.05  # a code used less than this share of the mean is moved to a vector of the batch

    def __post_init__(self) -> None:
        for name, known in (("head", HEADS), ("units", UNITS)):
            if getattr(self, name) not in known:
                raise MossError(f"objective: {name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if (self.head == "ctc") and self.units == "whisper":
            raise MossError("objective: units 'whisper' are for the head 'attention', expected words or characters")
        if not 0 < self.ema_decay < 1:
            raise MossError(f"objective: ema_decay is {self.ema_decay}, expected between 0 and 1")
        if self.layers < 1 or self.decoder_layers < 1:
            raise MossError("objective: layers and decoder_layers: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class SpeechTokenizerRun(BaseRun):
    """One training run of a speech tokenizer. Its manifests have audio and text."""

    kind: ClassVar[str] = "speech_tokenizer"
    reported_metrics: ClassVar[tuple[str, ...]] = (
        "asr_loss",
        "mel_loss",
        "commitment_loss",
        "perplexity",
        "code_use",
        "wer",
    )
    throughput_unit: ClassVar[str] = "seconds"

    model: SpeechTokenizerConfig
    data: tuple[str, ...]  # manifests
    held_out: tuple[str, ...] = ()  # manifests of the evaluation
    init: str = RANDOM  # "random", or the folder of a speech tokenizer or of a Whisper in the Hugging Face layout
    objective: Objective = Objective()
    buckets: tuple[float, ...] = (4.0, 8.0, 15.0, 30.0)  # seconds; clips are padded to the next one
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_known(dtype=("float32",))
        if not self.data:
            raise MossError("run: data has no manifest, expected at least one")
        if max(self.buckets, default=0) * self.model.sample_rate > self.model.samples_per_segment:
            raise MossError(
                f"run: the largest bucket is {max(self.buckets):g} s, expected at most a segment of the model, "
                f"{self.model.samples_per_segment / self.model.sample_rate:g} s"
            )

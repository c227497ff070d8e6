"""A run that trains a speech tokenizer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jax.sharding import Mesh

from moss_jax.errors import MossError
from moss_jax.progress import Say
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig
from moss_jax.train.run import BaseRun

if TYPE_CHECKING:
    from moss_jax.train.task import Task

HEADS = ("ctc", "attention")
UNITS = ("words", "characters", "whisper")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the codes must be good for. Nothing of it is in the exported speech tokenizer."""

    head: str = "ctc"  # "ctc", or "attention": Whisper's decoder
    units: str = "words"  # what is recognised: "words", "characters", or "whisper": those of its tokenizer.json
    vocabulary: int = 8192  # most units; rarer words are one unit, "unknown"
    layers: int = 2  # of the encoder after the quantiser; they see the whole clip
    decoder_layers: int = 2  # of "attention"
    max_units: int = 448  # of "attention": longest transcript, beginning and end included
    prompt: tuple[int, ...] = ()  # of "whisper": units before each transcript (language, task); not in the loss
    asr_weight: float = 1.0
    mel_weight: float = 1.0  # of the log-mel's reconstruction from the codes
    mel_hidden: int = 256  # width of the network that does it
    commitment_weight: float = 0.25
    commitment_from: int = 200  # steps; the weight is 0 before
    ema_decay: float = 0.99  # of the codebook's moving averages; less at first, which are over a tenth of the steps
    restart_below: float = 0.05  # a code used less than so many times the mean is put where speech is

    def __post_init__(self):
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
    """One run of a speech tokenizer's training. Its manifests have audio and text."""

    kind: ClassVar[str] = "speech_tokenizer"
    shown: ClassVar[tuple[str, ...]] = ("asr_loss", "mel_loss", "commitment_loss", "perplexity", "code_use", "wer")
    unit: ClassVar[str] = "seconds"

    model: SpeechTokenizerConfig
    data: tuple[str, ...]  # manifests
    held_out: tuple[str, ...] = ()  # manifests that the evaluation reads
    init: str = "random"  # "random", a folder with a speech tokenizer, or one with a Whisper of Hugging Face
    objective: Objective = Objective()
    buckets: tuple[float, ...] = (4.0, 8.0, 15.0, 30.0)  # seconds; clips are padded to the next one
    dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        self._check_known(dtype=("float32",))
        if not self.data:
            raise MossError("run: data has no manifest, expected one at least")
        if max(self.buckets, default=0) * self.model.sample_rate > self.model.samples_per_segment:
            raise MossError(
                f"run: buckets go to {max(self.buckets):g} s, expected at most a segment of the model, "
                f"{self.model.samples_per_segment / self.model.sample_rate:g} s"
            )

    def task(self, mesh: Mesh, say: Say) -> "Task":
        from moss_jax.train.speech_tokenizer.task import SpeechTokenizerTask

        return SpeechTokenizerTask(self, mesh, say)

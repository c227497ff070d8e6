"""Runs that train the speech decoder: `RUN = FlowRun(...)` or `RUN = VocoderRun(...)` in a config."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from jax.sharding import Mesh

from moss_jax.data import Mixture
from moss_jax.errors import MossError
from moss_jax.progress import Say
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.train.run import BaseRun
from moss_jax.train.speech_decoder.flow import FlowObjective
from moss_jax.train.speech_decoder.vocoder import VocoderObjective

if TYPE_CHECKING:
    from moss_jax.train.task import Task


@dataclass(frozen=True, kw_only=True)
class SpeechDecoderRun(BaseRun):
    """What both have. The parts that do not train are taken from `system`, or from `init`, into an export."""

    unit: ClassVar[str] = "frames"

    data: Mixture  # folders that `moss-jax tokenize --format decoder` made
    init: str = "random"  # a system folder, the folder of an earlier run of this kind (its last export), or "random"
    model: SpeechDecoderConfig | None = None  # None: the sizes of `init`, else those of `system`
    held_out: Mixture | None = None  # what the evaluation reads
    dtype: str = "float32"  # of activations
    export_dtype: str | None = None  # of the weights in an export; None: float32
    average: float = 0.0  # decay of the running average of the weights, which is measured and exported; 0: none
    system: str | None = None  # whose other parts an export gets; None: those of `init`, if it is a system

    def __post_init__(self):
        super().__post_init__()
        if not self.init:
            raise MossError('run: init is empty, expected a folder or "random"')
        if self.init == "random" and self.model is None and self.system is None:
            raise MossError("run: neither init, model nor system say how large the speech decoder is")
        if not 0 <= self.average < 1:
            raise MossError(f"run: average is {self.average}, expected 0 or more and below 1")


@dataclass(frozen=True, kw_only=True)
class FlowRun(SpeechDecoderRun):
    """Codes -> mel."""

    kind: ClassVar[str] = "flow"
    shown: ClassVar[tuple[str, ...]] = ("offline_loss", "stream_loss", "prior_loss")

    codes: int = 64  # of a row; longer recordings are cut, shorter ones padded
    objective: FlowObjective = field(default_factory=FlowObjective)

    def __post_init__(self):
        super().__post_init__()
        self._check_whole(1, "codes")

    def task(self, mesh: Mesh, say: Say) -> "Task":
        from moss_jax.train.speech_decoder.task import FlowTask

        return FlowTask(self, mesh, say)


@dataclass(frozen=True, kw_only=True)
class VocoderRun(SpeechDecoderRun):
    """Mel -> speech."""

    kind: ClassVar[str] = "vocoder"
    shown: ClassVar[tuple[str, ...]] = (
        "mel_loss",
        "stft_loss",
        "f0_loss",
        "generator_loss",
        "feature_loss",
        "generator_relative_loss",
        "discriminator_loss",
        "discriminator_relative_loss",
    )

    frames: int = 32  # mel frames of a row
    objective: VocoderObjective = field(default_factory=VocoderObjective)

    def __post_init__(self):
        super().__post_init__()
        self._check_whole(1, "frames")

    def task(self, mesh: Mesh, say: Say) -> "Task":
        from moss_jax.train.speech_decoder.task import VocoderTask

        return VocoderTask(self, mesh, say)

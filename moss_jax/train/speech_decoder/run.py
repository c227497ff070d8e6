"""Runs that train the speech decoder: a config sets `RUN = FlowRun(...)` or `RUN = VocoderRun(...)`."""

from dataclasses import dataclass, field
from typing import ClassVar

from moss_jax.data import Mixture
from moss_jax.errors import MossError
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.train.run import RANDOM, BaseRun
from moss_jax.train.speech_decoder.flow import FlowObjective
from moss_jax.train.speech_decoder.vocoder import VocoderObjective


@dataclass(frozen=True, kw_only=True)
class SpeechDecoderRun(BaseRun):
    """The fields of both kinds. An export takes the parts that are not trained from `system`, or else from `init`."""

    throughput_unit: ClassVar[str] = "frames"

    data: Mixture  # folders made by `moss-jax tokenize --format decoder`
    init: str = RANDOM  # a system folder, the folder of an earlier run of this kind (its last export), or "random"
    model: SpeechDecoderConfig | None = None  # None: the sizes of `init`, else those of `system`
    held_out: Mixture | None = None  # data of the evaluation
    dtype: str = "float32"  # of activations
    export_dtype: str | None = None  # of the weights in an export; None: float32
    ema_decay: float = 0.0  # of the moving average of the weights, which is evaluated and exported; 0: no average
    system: str | None = None  # source of the other parts of an export; None: `init`, if it is a system

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.init:
            raise MossError('run: init is empty, expected a folder or "random"')
        if self.init == RANDOM and self.model is None and self.system is None:
            raise MossError("run: no size of the speech decoder, expected one of init, model and system")
        if not 0 <= self.ema_decay < 1:
            raise MossError(f"run: ema_decay is {self.ema_decay}, expected at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class FlowRun(SpeechDecoderRun):
    """Codes -> mel."""

    kind: ClassVar[str] = "flow"
    reported_metrics: ClassVar[tuple[str, ...]] = ("offline_loss", "stream_loss", "prior_loss")

    codes: int = 64  # per row; longer recordings are cut, shorter ones padded
    objective: FlowObjective = field(default_factory=FlowObjective)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "codes")


@dataclass(frozen=True, kw_only=True)
class VocoderRun(SpeechDecoderRun):
    """Mel -> speech."""

    kind: ClassVar[str] = "vocoder"
    reported_metrics: ClassVar[tuple[str, ...]] = (
        "mel_loss",
        "stft_loss",
        "f0_loss",
        "generator_loss",
        "feature_loss",
        "generator_relative_loss",
        "discriminator_loss",
        "discriminator_relative_loss",
    )

    frames: int = 32  # mel frames per row
    objective: VocoderObjective = field(default_factory=VocoderObjective)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "frames")

"""A run that trains the language model."""

from dataclasses import dataclass
from typing import ClassVar

from moss_jax.data import Mixture
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.speech_lm.config import ATTENTION, DTYPES, REMAT
from moss_jax.train.run import BaseRun, require
from moss_jax.train.speech_lm.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Run(BaseRun):
    """One training run of the language model."""

    kind: ClassVar[str] = "language_model"
    reported_metrics: ClassVar[tuple[str, ...]] = ("text_loss", "audio_loss")

    init: str  # a Qwen3, released or system folder, the folder of an earlier run (its newest export), or "random"
    stage: Stage
    data: Mixture
    context: int  # rows per sequence
    model: SpeechLMConfig | None = None  # None: the sizes of `init`
    split: int | None = None  # layers of each branch when `init` is a Qwen3; None: a ninth of its depth
    held_out: Mixture | None = None  # data of the evaluation
    accumulate: int = 1  # gradient accumulation: parts of a batch that are computed one after the other
    frozen_dtype: str | None = "bfloat16"  # of parameters that do not train; None: as in `init`
    remat: str = "full"  # what the backward pass recomputes: "none", "dots" or "full"
    attention: str = "auto"  # how attention is computed; "auto": by backend
    export_dtype: str | None = None  # of trained parameters in an export; None: as the frozen ones, else as dtype
    # The system whose codec, text tokenizer and voices are copied into an export; None: those of `init`. When `init` is
    # a Qwen3, it also determines the number of speech codes.
    system: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "context", "accumulate")
        require(
            self.batch_size % self.accumulate == 0,
            f"batch_size {self.batch_size} does not divide into {self.accumulate} parts (accumulate)",
        )
        self._check_known(frozen_dtype=(*DTYPES, None), remat=REMAT, attention=ATTENTION)
        require(bool(self.init), "init is empty")

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"text_loss": self.stage.text_weight, "audio_loss": self.stage.audio_weight}

"""What `moss-jax compile` is asked for: function, model size, topology, mesh and batch."""

import importlib.util
import re
from dataclasses import dataclass

from moss_jax.errors import MossError

FUNCTIONS = {
    "prefill": "a prompt of `context` rows into empty caches",
    "decode": "the k-step decode chunk of the generation loop, with caches of `context` rows",
    "codec-encode": "speech -> codes, segments of 30 s",
    "codec-decode": "codes -> speech, offline, `context` codes including the prompt; noise is an input",
    "stage1": "a training step of the audio branch, everything else frozen; `batch` rows of `context`",
    "stage2": "a training step of the whole model",
    "sft": "the same step, for another context",
    "lora": "the same step with LoRA adapters of rank 16 on every kernel of the layers, the rest frozen",
}
TRAINING_FUNCTIONS = ("stage1", "stage2", "sft", "lora")
TRAINING_FIELDS = ("sequence", "accumulate", "remat", "mfu")  # fields of a request that only training steps use
MODEL_SIZES = ("8b", "tiny")
REMAT = ("none", "dots", "full")
TOPOLOGY_EXAMPLES = "one such as v5e:2x4, v6e:4x4 or v5p:2x2x1"


@dataclass(frozen=True)
class CompileRequest:
    """A function to compile and the devices to compile it for.

    A mesh axis of size 0 takes the devices that the other axes leave: "tensor" for the language model, "data" for the
    codec, "sequence" for training.
    """

    function: str  # one of FUNCTIONS
    size: str = "8b"  # one of MODEL_SIZES
    topology: str = "v5e:2x4"  # generation:chips, as libtpu names them
    data: int = 1
    fsdp: int = 1
    tensor: int = 0
    sequence: int = 0  # training only
    batch: int = 8
    context: int = 4096
    accumulate: int = 1  # training: micro-batches of a step
    remat: str = "full"  # training: one of REMAT
    mfu: float = 0.4  # training: share of the peak FLOP/s for which the step time is computed

    @property
    def is_training(self) -> bool:
        return self.function in TRAINING_FUNCTIONS

    def check(self) -> None:
        """Raises MossError for unknown names, sizes out of range, or a missing libtpu."""
        if self.function not in FUNCTIONS:
            raise MossError(f"unknown function {self.function!r}, expected one of {', '.join(FUNCTIONS)}")
        if self.size not in MODEL_SIZES:
            raise MossError(f"unknown model size {self.size!r}, expected one of {', '.join(MODEL_SIZES)}")
        for name in ("data", "fsdp", "batch", "context", "accumulate"):
            if getattr(self, name) < 1:
                raise MossError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.remat not in REMAT:
            raise MossError(f"remat is {self.remat!r}, expected one of {', '.join(REMAT)}")
        if not 0 < self.mfu <= 1:
            raise MossError(f"mfu is {self.mfu}, expected above 0 and at most 1")
        if not re.fullmatch(r"v\d+\w*:\d+(x\d+)*", self.topology):
            raise MossError(f"unknown topology {self.topology!r}, expected {TOPOLOGY_EXAMPLES}")
        if importlib.util.find_spec("libtpu") is None:
            raise MossError("libtpu is not installed, but compiling for a TPU needs it: pip install 'moss-jax[tpu]'")

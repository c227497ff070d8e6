"""Sizes and special ids of the layer-split transformer."""

from dataclasses import dataclass

from moss_jax.checkpoint.config_io import check_sizes
from moss_jax.errors import MossError

ATTENTION = ("auto", "xla", "cudnn", "splash")
REMAT = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SpeechLMConfig:
    """The Qwen3 block, the split of its depth, two vocabularies, and how to compute.

    A plain Qwen3 is the same model with everything on the text side: `num_shared_layers=0`, `audio_vocab_size=0`.
    """

    hidden_size: int  # D, width of the residual stream
    intermediate_size: int  # F, width of the SwiGLU feed-forward
    num_attention_heads: int  # N, query heads
    num_key_value_heads: int  # K, key and value heads; each serves N / K query heads
    head_dim: int  # H, even
    num_shared_layers: int  # layers that both modalities pass
    num_modality_layers: int  # layers of each branch, after the shared ones; 0: no split, the heads follow the shared
    text_vocab_size: int  # rows of the text table and text head, padding included
    audio_vocab_size: int  # rows of the audio table and audio head, padding included; 0: no audio branch
    endoftext_id: int = 151643  # text: end of a document, also the padding id
    im_start_id: int = 151644  # text: opens a turn
    im_end_id: int = 151645  # text: closes a turn
    sosp_id: int = 151646  # text: speech begins at the next row
    modality_pad_id: int = 151667  # text: this row is embedded from the audio table
    eosp_id: int = 16384  # audio: speech ends; the codes are the ids below
    audio_pad_id: int = 512  # audio: placeholder on text rows (also a real code)
    rope_theta: float = 1e6  # base of the rotary frequencies
    rms_norm_eps: float = 1e-6  # added to the mean square
    max_position_embeddings: int = 40960  # rows of context that the weights were made for
    attention: str = "auto"  # one of ATTENTION: how attention without a cache is computed; "auto": by backend
    remat: str = "none"  # one of REMAT: what the backward pass recomputes (nothing; all but products; everything)
    dtype: str = "float32"  # of activations
    param_dtype: str = "float32"  # of parameters

    def __post_init__(self):
        for name in _WHOLE:
            value = getattr(self, name)
            self._require(type(value) is int, f"{name} is {value!r}, expected a whole number")
        layers = ("num_shared_layers", "num_modality_layers")
        check_sizes(self, "transformer", zero=(*layers, "audio_vocab_size", *_IDS), layers=layers)
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            right = isinstance(value, int | float) and 0 < value < float("inf")
            self._require(right, f"{name} is {value!r}, expected a number above 0")
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads
        self._require(heads % kv_heads == 0, f"{heads} attention heads do not divide into {kv_heads} key/value heads")
        self._require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}, expected an even number")
        self._require(self.num_shared_layers + self.num_modality_layers > 0, "has no layers, expected at least 1")
        for name, known in (("attention", ATTENTION), ("remat", REMAT), ("dtype", DTYPES), ("param_dtype", DTYPES)):
            value = getattr(self, name)
            self._require(value in known, f"{name} is {value!r}, expected one of {', '.join(known)}")
        if self.audio_vocab_size:
            for name in ("endoftext_id", "im_start_id", "im_end_id", "sosp_id", "modality_pad_id"):
                self._require_id(name, self.text_vocab_size)
            for name in ("eosp_id", "audio_pad_id"):
                self._require_id(name, self.audio_vocab_size)

    def _require_id(self, name: str, vocab_size: int):
        value = getattr(self, name)
        self._require(0 <= value < vocab_size, f"{name} is {value}, expected an id below the vocabulary's {vocab_size}")

    @staticmethod
    def _require(condition: bool, problem: str):
        if not condition:
            raise MossError(f"transformer config: {problem}")


_IDS = ("endoftext_id", "im_start_id", "im_end_id", "sosp_id", "modality_pad_id", "eosp_id", "audio_pad_id")
_WHOLE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_shared_layers",
    "num_modality_layers",
    "text_vocab_size",
    "audio_vocab_size",
    "max_position_embeddings",
    *_IDS,
)

# fnlp/MOSS-Speech: 9,095,694,336 parameters.
MOSS_SPEECH_8B = SpeechLMConfig(
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    num_shared_layers=32,
    num_modality_layers=4,
    text_vocab_size=151680,
    audio_vocab_size=16512,
    dtype="bfloat16",
    param_dtype="bfloat16",
)

# Qwen/Qwen3-8B, from which the above was initialised: all 36 layers on the text side.
QWEN3_8B = SpeechLMConfig(
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    num_shared_layers=0,
    num_modality_layers=36,
    text_vocab_size=151936,
    audio_vocab_size=0,
    dtype="bfloat16",
    param_dtype="bfloat16",
)

# For tests.
TINY = SpeechLMConfig(
    hidden_size=64,
    intermediate_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_shared_layers=3,
    num_modality_layers=2,
    text_vocab_size=320,
    audio_vocab_size=96,
    endoftext_id=287,
    im_start_id=288,
    im_end_id=289,
    sosp_id=290,
    modality_pad_id=311,
    eosp_id=80,
    audio_pad_id=12,
    max_position_embeddings=512,
)

"""Sizes and special ids of the layer-split language model."""

from dataclasses import dataclass

from moss_jax.checkpoint.config_io import check_sizes
from moss_jax.nn.qwen3 import ATTENTION, DTYPES, REMAT, Qwen3Config

__all__ = [
    "ATTENTION",
    "DTYPES",
    "MOSS_SPEECH_8B",
    "QWEN3_8B",
    "REMAT",
    "TINY",
    "Channel",
    "SpeechLMConfig",
]


@dataclass(frozen=True)
class Channel:
    """One column of the grid, predicted by the branch of the same name."""

    name: str
    vocab_size: int  # ids are below this
    pad_id: int  # id on rows where the channel has nothing


@dataclass(frozen=True, kw_only=True)
class SpeechLMConfig(Qwen3Config):
    """The Qwen3 layer, the split of the depth, two vocabularies and their special ids.

    config.json of a system's `transformer/` folder has these fields, those of `Qwen3Config` included, in one object. A
    plain Qwen3 is the same model with everything on the text side: `num_shared_layers=0`, `audio_vocab_size=0`.
    """

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
    max_position_embeddings: int = 40960  # rows of context that the weights were trained for

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _SIZES + _TEXT_IDS + _AUDIO_IDS:
            value = getattr(self, name)
            self._require(type(value) is int, f"{name} is {value!r}, expected a whole number")
        layers = ("num_shared_layers", "num_modality_layers")
        check_sizes(self, "transformer", zero=(*layers, "audio_vocab_size", *_TEXT_IDS, *_AUDIO_IDS), layers=layers)
        self._require(self.num_shared_layers + self.num_modality_layers > 0, "has no layers, expected at least 1")
        if self.audio_vocab_size:
            self._require_ids(_TEXT_IDS, self.text_vocab_size)
            self._require_ids(_AUDIO_IDS, self.audio_vocab_size)

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The columns of the grid that the model predicts, in order; a plain Qwen3 has text only."""
        text = Channel("text", self.text_vocab_size, self.endoftext_id)
        audio = Channel("audio", self.audio_vocab_size, self.audio_pad_id)
        return (text, audio) if self.audio_vocab_size else (text,)

    def _require_ids(self, names: tuple[str, ...], vocab_size: int) -> None:
        for name in names:
            value = getattr(self, name)
            valid = 0 <= value < vocab_size
            self._require(valid, f"{name} is {value}, expected an id below the vocabulary's {vocab_size}")


_SIZES = (
    "num_shared_layers",
    "num_modality_layers",
    "text_vocab_size",
    "audio_vocab_size",
    "max_position_embeddings",
)
_TEXT_IDS = ("endoftext_id", "im_start_id", "im_end_id", "sosp_id", "modality_pad_id")
_AUDIO_IDS = ("eosp_id", "audio_pad_id")

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

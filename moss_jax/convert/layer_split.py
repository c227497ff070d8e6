"""How the parameters of a plain Qwen3 become those of a layer-split model."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moss_jax.errors import MossError
from moss_jax.speech_lm.config import SpeechLMConfig

AUDIO_TABLES = ("audio/embed/embedding", "audio/head/kernel")


def qwen3_config(config: SpeechLMConfig, text_vocab_size: int | None = None) -> SpeechLMConfig:
    """The plain Qwen3 that a layer-split model starts from: all layers on the text side, no audio.

    Args:
        config: of the layer-split model.
        text_vocab_size: of the Qwen3, which may have more (padding) rows; None: that of `config`.
    """
    depth = config.num_shared_layers + config.num_modality_layers
    vocab = config.text_vocab_size if text_vocab_size is None else text_vocab_size
    if vocab < config.text_vocab_size:
        raise MossError(
            f"Qwen3 config: vocabulary of {vocab}, expected at least {config.text_vocab_size} as in our model"
        )
    return replace(config, num_shared_layers=0, num_modality_layers=depth, audio_vocab_size=0, text_vocab_size=vocab)


def default_modality_layers(depth: int) -> int:
    """Layers of each branch for a Qwen3 with `depth` layers: a ninth, rounded (36 -> 4, 28 -> 3)."""
    return max(1, round(depth / 9))


def split_parameter(
    path: str, value: np.ndarray, config: SpeechLMConfig, tied: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, value) of the layer-split parameters that a parameter of a Qwen3 becomes.

    The lower layers become the shared block; the upper layers and the final norm become the text branch and a copy of
    it, the audio branch; the text embedding and head keep their first `text_vocab_size` rows. The text logits of a
    text-only grid are then exactly those of the Qwen3. Values may be views of `value`.

    Args:
        path, value: a parameter of the plain Qwen3 in our layout, layers stacked on axis 0.
        config: of the layer-split model.
        tied: whether the Qwen3 has no head; the text head is then a copy of the text embedding.
    """
    if path == "text/embed/embedding":
        value = value[: config.text_vocab_size]
        yield path, value
        if tied:
            yield "text/head/kernel", value.T
    elif path == "text/head/kernel":
        yield path, value[:, : config.text_vocab_size]
    elif path == "text/norm/scale":
        yield path, value
        yield "audio/norm/scale", value
    else:
        inner = path.removeprefix("text/layers/")
        if config.num_shared_layers:
            yield f"shared/layers/{inner}", value[: config.num_shared_layers]
        for branch in ("text", "audio") if config.num_modality_layers else ():
            yield f"{branch}/layers/{inner}", value[config.num_shared_layers :]


def new_audio_tables(config: SpeechLMConfig, seed: int, std: float = 0.02) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, value) of a random audio embedding and head, which a Qwen3 lacks: float32, normal(0, `std`).

    The default `std` is Qwen3's `initializer_range`.
    """
    rng = np.random.default_rng(seed)
    for path in AUDIO_TABLES:
        value = rng.standard_normal((config.audio_vocab_size, config.hidden_size), np.float32) * np.float32(std)
        yield path, value if path == "audio/embed/embedding" else value.T

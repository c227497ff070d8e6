"""The components that a system can have, and what they must have in common."""

from typing import Any

from moss_jax.checkpoint.component import Component
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.errors import MossError
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_lm import SpeechLMConfig
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.speech_tokenizer.component import SPEECH_TOKENIZER

COMPONENTS: tuple[Component[Any], ...] = (SPEECH_LM, SPEECH_TOKENIZER, SPEECH_DECODER)


def check_codes(folder: SystemFolder, language_model: SpeechLMConfig | None = None, where: str | None = None) -> None:
    """Checks that all components of a system have the same number of speech codes.

    Only configs are read. A component that the system does not have is not compared, nor is a language model without
    an audio vocabulary.

    Args:
        language_model: config to compare with the other components instead of the folder's own language model.
        where: what the message is about, the folder by default.

    Raises:
        MossError: the numbers differ, or a config cannot be read.
    """
    counts: dict[str, int] = {}
    for component in COMPONENTS:
        if component is SPEECH_LM and language_model is not None:
            config: Any = language_model
        elif folder.has(component):
            config = folder.config(component)
        else:
            continue
        count = component.code_count(config)
        if count is not None:
            counts[component.title] = count
    if len(set(counts.values())) > 1:
        found = ", ".join(f"the {title} has {count}" for title, count in counts.items())
        raise MossError(f"{where or folder.path}: different numbers of speech codes, expected the same: {found}")

"""The chat template: the text pieces that surround each turn and request a reply, and the default system prompts.

Each piece is tokenized separately with special tokens enabled (`TextTokenizer.encode_template`), so that no BPE merge
crosses the border to what a person wrote.
"""

from moss_jax.errors import MossError
from moss_jax.text.tokenizer import SPECIAL_STRINGS

REPLIES = ("speech", "text")  # the modalities that a reply can have

# The system prompt of a conversation without a system turn, in training and in generation: the one that the released
# driver sends for each reply modality.
DEFAULT_SYSTEM_PROMPT = {
    "speech": "You are a helpful voice assistant. Answer the user's questions with spoken responses.",
    "text": "You are a helpful assistant. Answer the user's questions with text.",
}

TURN_END = f"{SPECIAL_STRINGS['im_end_id']}\n"


def turn_start(role: str) -> str:
    """The template text before the content of a turn."""
    return f"{SPECIAL_STRINGS['im_start_id']}{role}\n"


def reply_start(reply: str) -> str:
    """The template text that requests a reply from the assistant; a spoken reply starts with the start of speech.

    Raises:
        MossError: `reply` is not one of REPLIES.
    """
    check_reply(reply)
    speech_start = SPECIAL_STRINGS["sosp_id"] if reply == "speech" else ""
    return f"{turn_start('assistant')}{speech_start}"


def check_reply(reply: str) -> None:
    """Raises MossError unless `reply` is one of REPLIES."""
    if reply not in REPLIES:
        raise MossError(f"reply: {reply!r}, expected one of {', '.join(REPLIES)}")

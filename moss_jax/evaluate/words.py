"""Text as words to compare: of transcripts (word error rate) and of answers (is the answer in the reply?).

Words are lower case without punctuation. A Chinese, Japanese or Korean character is a word of its own, so that one rate
serves every language. Numbers stay as they are written: "4" and "four" differ, so a file of answers names both.
"""

from collections.abc import Sequence

from moss_jax.text.words import UNSPACED_CHARACTER, normalized_words

ARTICLES = {"a", "an", "the"}


def continuation(first: str, second: str) -> str:
    """What `second` is when it goes on from `first`: with a space in front where the language writes one."""
    if not first or first[-1].isspace() or second[:1].isspace() or UNSPACED_CHARACTER.match(second):
        return second
    return f" {second}"


def contains_answer(reply: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the reply, word for word; articles do not count."""
    said = _without_articles(reply)
    for answer in map(_without_articles, answers):
        if answer and any(said[i : i + len(answer)] == answer for i in range(len(said) - len(answer) + 1)):
            return True
    return False


def _without_articles(text: str) -> list[str]:
    return [word for word in normalized_words(text) if word not in ARTICLES]

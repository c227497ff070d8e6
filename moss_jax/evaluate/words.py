"""Texts as words, for comparing transcripts (word error rate) and answers (is the answer in the reply?).

Words are lower case without punctuation. A Chinese, Japanese or Korean character is a word of its own, so that one rate
serves every language. Numbers are not normalized: "4" and "four" differ, so a file of answers should contain both.
"""

from collections.abc import Sequence

from moss_jax.text.words import UNSPACED_CHARACTER, normalized_words

ARTICLES = {"a", "an", "the"}


def continuation(first: str, second: str) -> str:
    """`second` as the continuation of `first`: with a space before it if the script uses spaces."""
    if not first or first[-1].isspace() or second[:1].isspace() or UNSPACED_CHARACTER.match(second):
        return second
    return f" {second}"


def contains_answer(reply: str, answers: Sequence[str]) -> bool:
    """Whether the words of one of the answers occur in the reply, in order and side by side; articles are ignored."""
    reply_words = _without_articles(reply)
    for answer in map(_without_articles, answers):
        if answer and any(
            reply_words[i : i + len(answer)] == answer for i in range(len(reply_words) - len(answer) + 1)
        ):
            return True
    return False


def _without_articles(text: str) -> list[str]:
    return [word for word in normalized_words(text) if word not in ARTICLES]

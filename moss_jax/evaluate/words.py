"""Text as words to compare: of transcripts (word error rate) and of answers (is the answer in the reply?).

Words are lower case without punctuation. A Chinese, Japanese or Korean character is a word of its own, so that one rate
serves every language. Numbers stay as they are written: "4" and "four" differ, so a file of answers names both.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

ARTICLES = {"a", "an", "the"}
# Ideographs, kana, hangul: scripts written without spaces, or counted by character.
_NO_SPACES = re.compile("[぀-ヿ㐀-䶿一-鿿豈-﫿가-힯\U00020000-\U0003134f]")
_APOSTROPHE = re.compile("['’ʼ]")


def words(text: str) -> list[str]:
    """The words of a text: compatibility forms folded (NFKC), lower case, apostrophes dropped, other punctuation and
    symbols taken for spaces."""
    text = _APOSTROPHE.sub("", unicodedata.normalize("NFKC", text).lower())
    text = "".join(" " if unicodedata.category(char)[0] in "PSZC" else char for char in text)
    return _NO_SPACES.sub(lambda found: f" {found[0]} ", text).split()


def joined(first: str, second: str) -> str:
    """What `second` is when it goes on from `first`: with a space in front where the language writes one."""
    if not first or first[-1].isspace() or second[:1].isspace() or _NO_SPACES.match(second):
        return second
    return f" {second}"


def errors(reference: Sequence[str], found: Sequence[str]) -> int:
    """Least number of words to put in, take out or change (Levenshtein)."""
    codes: dict[str, int] = {}
    wanted, other = (np.array([codes.setdefault(w, len(codes)) for w in text], int) for text in (reference, found))
    row = columns = np.arange(len(other) + 1)
    for count, word in enumerate(wanted, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (other != word))
        # Words put in: best[j] may come from any column on the left, one more a column.
        row = np.minimum.accumulate(np.concatenate([[count], best]) - columns) + columns
    return int(row[-1])


def answered(reply: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the reply, word for word; articles do not count."""
    said = _without_articles(reply)
    for answer in map(_without_articles, answers):
        if answer and any(said[i : i + len(answer)] == answer for i in range(len(said) - len(answer) + 1)):
            return True
    return False


def _without_articles(text: str) -> list[str]:
    return [word for word in words(text) if word not in ARTICLES]

"""Text as words to compare, and how many of them differ.

Words are lower case without punctuation. A Chinese, Japanese or Korean character is a word of its own, so that one rate
serves every language.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

# Ideographs, kana, hangul: scripts written without spaces, or counted by character.
NO_SPACES = re.compile("[぀-ヿ㐀-䶿一-鿿豈-﫿가-힯\U00020000-\U0003134f]")
_APOSTROPHE = re.compile("['’ʼ]")


def words(text: str) -> list[str]:
    """The words of a text: compatibility forms folded (NFKC), lower case, apostrophes dropped, other punctuation and
    symbols taken for spaces."""
    text = _APOSTROPHE.sub("", unicodedata.normalize("NFKC", text).lower())
    text = "".join(" " if unicodedata.category(char)[0] in "PSZC" else char for char in text)
    return NO_SPACES.sub(lambda found: f" {found[0]} ", text).split()


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

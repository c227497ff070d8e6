"""Text as comparable words, and the number of word errors between two texts (the numerator of a word error rate).

Words are lower case without punctuation. A Chinese, Japanese or Korean character is a word of its own, so that one
error rate serves all languages. Numbers are not converted: "4" and "four" differ.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

# Ideographs, kana and hangul: scripts that are written without spaces or counted by character.
UNSPACED_CHARACTER = re.compile("[぀-ヿ㐀-䶿一-鿿豈-﫿가-힯\U00020000-\U0003134f]")
_APOSTROPHE = re.compile("['’ʼ]")


def normalized_words(text: str) -> list[str]:
    """The words of a text after normalisation.

    Compatibility forms are folded (NFKC), letters are lower case, apostrophes are dropped, and other punctuation and
    symbols separate words.
    """
    text = _APOSTROPHE.sub("", unicodedata.normalize("NFKC", text).lower())
    text = "".join(" " if unicodedata.category(char)[0] in "PSZC" else char for char in text)
    return UNSPACED_CHARACTER.sub(lambda match: f" {match[0]} ", text).split()


def word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """The least number of words to insert, delete or replace (Levenshtein distance)."""
    ids: dict[str, int] = {}
    reference_ids = [ids.setdefault(word, len(ids)) for word in reference]
    hypothesis_ids = np.array([ids.setdefault(word, len(ids)) for word in hypothesis], int)
    columns = np.arange(len(hypothesis_ids) + 1)
    row = columns
    for count, word in enumerate(reference_ids, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (hypothesis_ids != word))
        # Insertions: column j can be reached from every column to its left, at a cost of one per column.
        row = np.minimum.accumulate(np.concatenate([[count], best]) - columns) + columns
    return int(row[-1])

"""Words, answers, error counts and intervals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.evaluate.results import ratio_interval, wilson_interval
from moss_jax.evaluate.words import contains_answer, continuation
from moss_jax.text.words import normalized_words, word_errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop -- it's 4 o'clock!", ["dont", "stop", "its", "4", "oclock"]),
        ("ＦＵＬＬ width，　café", ["full", "width", "café"]),
        ("我在Paris。", ["我", "在", "paris"]),
        ("  ", []),
    ],
)
def test_words(text, expected):
    assert normalized_words(text) == expected


def test_an_answer_is_found_word_for_word():
    assert contains_answer("Well, it is the City of Paris!", ["a city of paris"])
    assert contains_answer("北京是首都", ["首都"])
    assert not contains_answer("It is Parisian.", ["Paris"])
    assert not contains_answer("of Paris city", ["city of Paris"])
    assert not contains_answer("", ["Paris"])


def test_a_continuation_starts_with_a_space_in_scripts_with_spaces():
    assert continuation("He was hungry.", "He ate.") == " He ate."
    assert continuation("He was hungry. ", "He ate.") == "He ate."
    assert continuation("他饿了。", "他吃了。") == "他吃了。"


@given(*[st.lists(st.sampled_from("abcd"), max_size=9)] * 2)
def test_errors_are_the_levenshtein_distance(reference, found):
    table = np.zeros((len(reference) + 1, len(found) + 1), int)
    table[:, 0] = np.arange(len(reference) + 1)
    table[0] = np.arange(len(found) + 1)
    for i in range(len(reference)):
        for j in range(len(found)):
            change = table[i, j] + (reference[i] != found[j])
            table[i + 1, j + 1] = min(change, table[i, j + 1] + 1, table[i + 1, j] + 1)
    assert word_errors(reference, found) == table[-1, -1]


def test_wilson_interval():
    low, high = wilson_interval(8, 10)  # as in textbooks
    assert math.isclose(low, 0.4902, abs_tol=5e-5) and math.isclose(high, 0.9433, abs_tol=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(10, 10)[1] == 1.0 and wilson_interval(0, 10)[0] == 0.0


def test_the_interval_of_a_rate_covers_it():
    low, high = ratio_interval([1, 0, 2, 0, 1], [10, 8, 12, 9, 11])
    assert low < 4 / 50 < high
    assert ratio_interval([1, 1, 1], [4, 4, 4]) == (0.25, 0.25)

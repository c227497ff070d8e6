"""Nearly valid JSON: values of the wrong type or size, and text that json.dumps cannot write."""

import json
from itertools import islice
from typing import Any

from hypothesis import strategies as st

SIMILAR = 30  # entries of an object or a list that may change; a vocabulary has thousands of similar ones
# Strings that `json_text` replaces by what json.dumps refuses to write.
RAW = {
    '"@deep@"': "[" * 100_000 + "]" * 100_000,
    '"@deep objects@"': '{"a":' * 2000 + "1" + "}" * 2000,
    '"@digits@"': "9" * 5000,
    '"@exponent@"': "1e999",
    '"@surrogate@"': r'"\ud800"',
    '"@nul@"': r'"a\u0000b"',
    '"@long@"': '"' + "x" * 5000 + '"',
    '"@unclosed@"': '"',
}
INTEGERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from(
        [2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**31) - 1, -(2**63) - 1, 10**30]
    ),
)
TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    INTEGERS,
    st.floats(),
    TEXT,
    st.sampled_from(["", ".", "..", "/", "a/b", "\u2028", "1", "true", "\x00", "é" * 200]),
    *[st.sampled_from([name.strip('"') for name in RAW])] * 3,
)
VALUES = st.one_of(
    SCALARS,
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
        max_leaves=6,
    ),
)
# Which of the places of a document changes (modulo their number), how, and the new value.
Change = tuple[int, str, Any]
CHANGES = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from(["set", "set", "set", "remove", "add"]), VALUES),
    min_size=1,
    max_size=3,
)


def json_text(value: Any, ascii_only: bool = True) -> str:
    """JSON of a value, with the strings of RAW replaced."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    for name, raw in RAW.items():
        text = text.replace(name, raw)
    return text


def changed(document: Any, changes: list[Change]) -> Any:
    """A copy of a JSON document in which some values are replaced, removed, or have a new neighbour."""
    for place, kind, value in changes:
        places = list(_places(document, ()))
        if not places:
            return value
        document = _changed(document, places[place % len(places)], kind, value)
    return document


def _places(document: Any, path: tuple) -> Any:
    yield path
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    else:
        return
    for key, inner in islice(items, SIMILAR):
        yield from _places(inner, (*path, key))


def _changed(document: Any, path: tuple, kind: str, value: Any) -> Any:
    if not path:
        if kind == "add" and isinstance(document, dict):
            return {**document, "added": value}
        if kind == "add" and isinstance(document, list):
            return [*document, value]
        return value
    key = path[0]
    copy = document.copy()
    if len(path) == 1 and kind == "remove":
        del copy[key]
    else:
        copy[key] = _changed(document[key], path[1:], kind, value)
    return copy

"""Changes to bytes, as data: cut, overwrite, insert, remove, repeat, join."""

from collections.abc import Sequence

from hypothesis import strategies as st

Edit = tuple[str, int, bytes]

HEADER = 160  # bytes in which most formats keep what a reader trusts
NUMBERS = sorted({0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1})


def edits(max_size: int = 4) -> st.SearchStrategy[list[Edit]]:
    """A few edits. A position is a whole number of any size: `edited` takes it modulo the length."""
    place = st.one_of(st.integers(0, HEADER), st.integers(0, 2**20))
    number = st.builds(
        lambda value, width, order: (value % 256**width).to_bytes(width, order),
        st.one_of(st.sampled_from(NUMBERS), st.integers(0, 2**64 - 1)),
        st.sampled_from([1, 2, 3, 4, 8]),
        st.sampled_from(["little", "big"]),
    )
    content = st.one_of(number, st.binary(min_size=1, max_size=12), st.integers(1, 40).map(bytes))
    edit = st.one_of(
        st.tuples(st.just("cut"), place, st.just(b"")),
        st.tuples(st.just("write"), place, content),
        st.tuples(st.just("insert"), place, content),
        st.tuples(st.just("remove"), place, content),
        st.tuples(st.just("repeat"), place, content),
        st.tuples(st.just("join"), place, st.just(b"")),
    )
    return st.lists(edit, max_size=max_size)


def edited(data: bytes, changes: Sequence[Edit], other: bytes = b"") -> bytes:
    """The bytes after all edits in their order; "join" puts `other` after the position."""
    for kind, place, content in changes:
        place = place % (len(data) + 1)
        before = data[:place]
        after = data[place:]
        if kind == "cut":
            data = before
        elif kind == "write":
            data = before + content + after[len(content) :]
        elif kind == "insert":
            data = before + content + after
        elif kind == "remove":
            data = before + after[len(content) :]
        elif kind == "repeat":
            data = before + after[: 64 * len(content)] * 3 + after
        else:
            data = before + other
    return data

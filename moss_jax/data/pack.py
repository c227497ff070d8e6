"""Packing: which piece of which example lies in which row, for a whole epoch, from the lengths alone.

Examples are shuffled. One that is longer than the context is cut into consecutive pieces, each a sequence of its own.
Then blocks of some thousand pieces in shuffled order are packed: longest first, each into the fullest row that still
has place; and all rows are shuffled. Nothing is dropped and nothing comes twice.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

# a block has at least so many pieces, and is worth about so many rows
BLOCK_PIECES = 4096
BLOCK_ROWS = 256


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Rows of packed pieces. Row r holds the pieces begin[r] .. begin[r+1] - 1, from left to right.

    Attributes:
        begin: int64 [rows + 1].
        example: int64 [pieces]. start, stop: int64 [pieces], the rows of the example that the piece is.
    """

    begin: np.ndarray
    example: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.begin) - 1

    def row(self, index: int) -> list[tuple[int, int, int]]:
        """[(example, start, stop)] of a row."""
        part = slice(self.begin[index], self.begin[index + 1])
        return list(zip(*(x[part].tolist() for x in (self.example, self.start, self.stop)), strict=True))


def plan_packing(lengths: np.ndarray, context: int, random: np.random.Generator) -> PackingPlan:
    """The packed rows of one epoch of examples with these lengths (whole numbers above 0)."""
    order = random.permutation(len(lengths))
    example, start, stop = _pieces(np.asarray(lengths, np.int64)[order], order, context)
    sizes = stop - start
    block = max(BLOCK_PIECES, int(BLOCK_ROWS * context / sizes.mean()))
    rows = np.empty(len(sizes), np.int64)
    count = 0
    for begin in range(0, len(sizes), block):
        part, used = pack_block(sizes[begin : begin + block], context)
        rows[begin : begin + block] = part + count
        count += used
    rows = random.permutation(count)[rows]
    by_row = np.argsort(rows, kind="stable")
    begins = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
    return PackingPlan(begins, example[by_row], start[by_row], stop[by_row])


def pack_block(sizes: np.ndarray, context: int) -> tuple[np.ndarray, int]:
    """Best fit, longest first: the row of each piece, int64 [pieces], and how many rows there are."""
    rows = np.empty(len(sizes), np.int64)
    places: list[tuple[int, int]] = []  # (room left, row), sorted
    count = 0
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(places, (size, -1))
        if at < len(places):
            room, row = places.pop(at)
        else:
            room = context
            row = count
            count = count + 1
        rows[piece] = row
        if room > size:
            insort(places, (room - size, row))
    return rows, count


def _pieces(lengths: np.ndarray, order: np.ndarray, context: int):
    counts = -(-lengths // context)
    example = np.repeat(order, counts)
    whole = np.repeat(lengths, counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(example)) - first) * context
    return example, start, np.minimum(start + context, whole)

"""Packing: which piece of which example is in which row, for a whole epoch, computed from the lengths alone.

Examples are shuffled. An example longer than the context is cut into consecutive pieces, each a sequence of its own.
Blocks of some thousand pieces, in shuffled order, are packed longest first, each piece into the fullest row that has
space for it; then all rows are shuffled. No piece is dropped or repeated.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

# A block has at least this many pieces, and enough for about this many rows: large blocks leave little padding, small
# ones keep the order random.
BLOCK_PIECES = 4096
BLOCK_ROWS = 256


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Rows of packed pieces. Row r holds the pieces begin[r] .. begin[r+1] - 1, from left to right.

    Attributes:
        begin: int64 [rows + 1].
        example: int64 [pieces], the index of the example.
        start, stop: int64 [pieces], the part of the example, in rows of its grid.
    """

    begin: np.ndarray
    example: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.begin) - 1

    def row(self, index: int) -> list[tuple[int, int, int]]:
        """[(example, start, stop)] of a row."""
        pieces = slice(self.begin[index], self.begin[index + 1])
        columns = (self.example[pieces].tolist(), self.start[pieces].tolist(), self.stop[pieces].tolist())
        return list(zip(*columns, strict=True))


def plan_packing(lengths: np.ndarray, context: int, random: np.random.Generator) -> PackingPlan:
    """The packed rows of one epoch.

    Args:
        lengths: integers > 0 [examples].
        context: length of a packed row.
    """
    order = random.permutation(len(lengths))
    example, start, stop = _cut(np.asarray(lengths, np.int64)[order], order, context)
    sizes = stop - start
    block = max(BLOCK_PIECES, int(BLOCK_ROWS * context / sizes.mean()))
    rows = np.empty(len(sizes), np.int64)
    row_count = 0
    for begin in range(0, len(sizes), block):
        block_rows, block_row_count = pack_block(sizes[begin : begin + block], context)
        rows[begin : begin + block] = block_rows + row_count
        row_count += block_row_count
    rows = random.permutation(row_count)[rows]
    by_row = np.argsort(rows, kind="stable")
    begins = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=row_count))])
    return PackingPlan(begins, example[by_row], start[by_row], stop[by_row])


def pack_block(sizes: np.ndarray, context: int) -> tuple[np.ndarray, int]:
    """Best fit, longest first: the row of each piece, int64 [pieces], and the number of rows."""
    rows = np.empty(len(sizes), np.int64)
    open_rows: list[tuple[int, int]] = []  # (free space, row), sorted
    row_count = 0
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fullest = bisect_left(open_rows, (size, -1))
        if fullest < len(open_rows):
            free, row = open_rows.pop(fullest)
        else:
            free = context
            row = row_count
            row_count += 1
        rows[piece] = row
        if free > size:
            insort(open_rows, (free - size, row))
    return rows, row_count


def _cut(lengths: np.ndarray, order: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples of `lengths` cut into pieces of at most `context`: (example, start, stop), int64 [pieces] each."""
    counts = -(-lengths // context)
    example = np.repeat(order, counts)
    length = np.repeat(lengths, counts)
    first_piece = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(example)) - first_piece) * context
    return example, start, np.minimum(start + context, length)

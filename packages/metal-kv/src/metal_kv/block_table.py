"""Block ids of every request, on the host, ready to be read by a step."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from metal_kv.errors import BlockTableError


class BlockTable:
    """A preallocated int32 table: one row of block ids per request.

    Everything right of a row's length is 0, the null block, so that any prefix of columns is a table
    padded as kernels expect it.

    Where kernels want smaller blocks than the allocator, the table holds kernel blocks: an id is translated
    once, when it is added, so a step costs nothing more however long its contexts are.

    Invariants (``tests/test_block_table.py``): the table equals a list of lists under any schedule of
    changes; columns beyond a row's length are 0; in kernel blocks it is ``kernel_block_table`` of that.

    Args:
        max_reqs: Rows.
        max_blocks: Allocated blocks of the longest request.
        kernel_blocks_per_block: Kernel blocks that make up an allocated one.
    """

    def __init__(self, max_reqs: int, max_blocks: int, kernel_blocks_per_block: int = 1) -> None:
        if min(max_reqs, max_blocks, kernel_blocks_per_block) < 1:
            raise BlockTableError(
                f"[BlockTable] expected at least one row, one column and one kernel block to a block, got "
                f"{max_reqs}, {max_blocks} and {kernel_blocks_per_block}. "
                "Size the table by the largest batch and the longest request."
            )
        self.kernel_blocks_per_block = kernel_blocks_per_block
        self._table = np.zeros((max_reqs, max_blocks * kernel_blocks_per_block), np.int32)
        self._num_blocks = np.zeros(max_reqs, np.int64)
        self._num_blocks_view = self._num_blocks.view()
        self._num_blocks_view.flags.writeable = False

    @property
    def max_reqs(self) -> int:
        """Number of rows."""
        return int(self._table.shape[0])

    @property
    def max_blocks(self) -> int:
        """Most allocated blocks a row can hold."""
        return int(self._table.shape[1]) // self.kernel_blocks_per_block

    @property
    def num_blocks(self) -> np.ndarray:
        """Allocated blocks in use per row; a read-only view that follows later changes."""
        return self._num_blocks_view

    def row(self, row: int) -> Int32[np.ndarray, "blocks"]:
        """Return a copy of the allocated blocks of one row, without padding."""
        self._check_row("row", row)
        ratio = self.kernel_blocks_per_block
        first: np.ndarray = self._table[row, : self._columns(row) : ratio]
        return first // np.int32(ratio)

    def add_row(self, row: int, block_ids: Sequence[int]) -> None:
        """Make ``block_ids`` the content of a row, whatever it held before."""
        self._check_row("add_row", row)
        ids = self._checked_ids("add_row", row, 0, block_ids)
        self._table[row, : self._columns(row)] = 0
        self._put(row, 0, ids)

    def append_row(self, row: int, block_ids: Sequence[int]) -> None:
        """Append block ids to a row."""
        self._check_row("append_row", row)
        start = int(self._num_blocks[row])
        self._put(row, start, self._checked_ids("append_row", row, start, block_ids))

    def clear_row(self, row: int) -> None:
        """Empty a row."""
        self._check_row("clear_row", row)
        self._table[row, : self._columns(row)] = 0
        self._num_blocks[row] = 0

    def move_row(self, source: int, destination: int) -> None:
        """Move a row over another one and leave the source empty."""
        self._check_row("move_row", source)
        self._check_row("move_row", destination)
        if source != destination:
            used = max(self._columns(source), self._columns(destination))
            self._table[destination, :used] = self._table[source, :used]
            self._num_blocks[destination] = self._num_blocks[source]
            self.clear_row(source)

    def swap_row(self, first: int, second: int) -> None:
        """Exchange two rows."""
        self._check_row("swap_row", first)
        self._check_row("swap_row", second)
        pair, reverse = [first, second], [second, first]
        used = max(self._columns(first), self._columns(second))
        self._table[pair, :used] = self._table[reverse, :used]
        self._num_blocks[pair] = self._num_blocks[reverse]

    def rows(self, rows: int | Sequence[int] | np.ndarray) -> Int32[np.ndarray, "reqs max_blocks"]:
        """Return the rows of a step in kernel blocks, trimmed to the longest of them (at least one block).

        Args:
            rows: The rows in step order, or a number ``n`` for the first ``n`` rows.

        Returns:
            A view of the table when the rows follow one another, else a copy. A view shows later changes:
            build the step before changing the table.
        """
        if isinstance(rows, int):
            if not 0 <= rows <= self.max_reqs:
                raise BlockTableError(
                    f"[BlockTable.rows] expected 0 to {self.max_reqs} rows, got {rows}. Enlarge max_reqs."
                )
            return self._table[:rows, : self._widest(self._num_blocks[:rows])]
        indices = np.asarray(rows, np.intp)
        if indices.size and (indices.min() < 0 or indices.max() >= self.max_reqs):
            raise BlockTableError(
                f"[BlockTable.rows] expected rows in 0..{self.max_reqs - 1}, got {indices.tolist()}. "
                "Pass rows that were added."
            )
        table = self._table[:, : self._widest(self._num_blocks[indices])]
        if indices.size and np.all(np.diff(indices) == 1):
            return table[indices[0] : indices[-1] + 1]
        return table[indices]

    def _widest(self, num_blocks: np.ndarray) -> int:
        return int(num_blocks.max(initial=1)) * self.kernel_blocks_per_block

    def _columns(self, row: int) -> int:
        return int(self._num_blocks[row]) * self.kernel_blocks_per_block

    def _put(self, row: int, start: int, ids: np.ndarray) -> None:
        ratio = self.kernel_blocks_per_block
        kernel_ids = kernel_block_table(ids[None], ratio)[0]
        self._table[row, start * ratio : start * ratio + kernel_ids.size] = kernel_ids
        self._num_blocks[row] = start + ids.size

    def _check_row(self, operation: str, row: int) -> None:
        if not 0 <= row < self.max_reqs:
            raise BlockTableError(
                f"[BlockTable.{operation}] expected a row in 0..{self.max_reqs - 1}, got {row}. Enlarge max_reqs."
            )

    def _checked_ids(self, operation: str, row: int, start: int, block_ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(block_ids, np.int32)
        if start + ids.size > self.max_blocks:
            raise BlockTableError(
                f"[BlockTable.{operation}] expected at most {self.max_blocks} blocks in row {row}, "
                f"got {start + ids.size}. Enlarge max_blocks or shorten the request."
            )
        if ids.size and ids.min() < 0:
            raise BlockTableError(
                f"[BlockTable.{operation}] expected block ids >= 0, got {int(ids.min())} for row {row}. "
                "Pass the ids of the allocator unchanged; 0 stands for a block that is gone."
            )
        return ids


def kernel_block_table(
    block_table: Int32[np.ndarray, "reqs max_blocks"], blocks_per_block: int
) -> Int32[np.ndarray, "reqs kernel_blocks"]:
    """Return the table in kernel blocks, each allocated block being ``blocks_per_block`` consecutive ones.

    Block ``b`` becomes ``b * blocks_per_block + 0, 1, …``; the null block stays 0 in every column.
    """
    if blocks_per_block == 1:
        return block_table
    first = block_table[:, :, None] * np.int32(blocks_per_block)
    expanded = first + np.arange(blocks_per_block, dtype=np.int32)
    np.multiply(expanded, first != 0, out=expanded)
    return expanded.reshape(block_table.shape[0], block_table.shape[1] * blocks_per_block)

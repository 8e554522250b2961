"""Positions of tokens that lie in a grid of time, height and width."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32


@dataclass(frozen=True)
class Grid:
    """Tokens that are the cells of a grid, in the order of time, height and width.

    Attributes:
        offset: Position of the first in the prompt.
        times: Steps of time.
        height: Rows.
        width: Cells of a row.
        time_step: What the coordinate grows by from one step of time to the next; sums are cut to integers.
    """

    offset: int
    times: int
    height: int
    width: int
    time_step: float = 1.0

    def coordinates(self) -> Int32[np.ndarray, "3 tokens"]:
        """Return the cells, from 0."""
        cells = np.indices((self.times, self.height, self.width)).reshape(3, -1)
        cells[0] = (cells[0] * self.time_step).astype(np.int64)
        return cells.astype(np.int32)


def grid_positions(num_tokens: int, grids: Iterable[Grid]) -> tuple[Int32[np.ndarray, "3 tokens"], int]:
    """Return the coordinates of a prompt, and what to add to a later token's position.

    Text counts up in all three; a grid starts where the text before it ends, and the text after it starts beyond the
    largest coordinate of the grid.

    Args:
        num_tokens: Length of the prompt.
        grids: Its grids, by offset.
    """
    parts: list[np.ndarray] = []
    start, position = 0, 0
    for grid in grids:
        text = grid.offset - start
        parts.append(np.broadcast_to(np.arange(position, position + text, dtype=np.int32), (3, text)))
        cells = grid.coordinates() + np.int32(position + text)
        parts.append(cells)
        start, position = grid.offset + cells.shape[1], int(cells.max(initial=position + text - 1)) + 1
    rest = num_tokens - start
    parts.append(np.broadcast_to(np.arange(position, position + rest, dtype=np.int32), (3, rest)))
    return np.concatenate(parts, axis=1), position + rest - num_tokens

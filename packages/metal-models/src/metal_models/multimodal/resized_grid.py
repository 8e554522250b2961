"""Grids of rows at another height and width."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32

Weigh = Callable[[np.ndarray], np.ndarray]


def linear(distance: np.ndarray) -> np.ndarray:
    """Return the weight of a cell at some distances, in cells, between the two nearest."""
    weight: np.ndarray = np.maximum(1 - np.abs(distance), 0)
    return weight


def cubic(distance: np.ndarray) -> np.ndarray:
    """Return the weight of a cell at some distances, in cells, among the four nearest (Keys, with -0.75)."""
    near, a = np.abs(distance), -0.75
    inner = ((a + 2) * near - (a + 3)) * near**2 + 1
    outer = a * (((near - 5) * near + 8) * near - 4)
    return np.where(near <= 1, inner, np.where(near < 2, outer, 0))


def resized(
    grids: Float[mx.array, "grids rows columns width"], rows: int, columns: int, weigh: Weigh = linear
) -> Float[mx.array, "grids new_rows new_columns width"]:
    """Return grids of another size in float32; beyond their edges lie cells like those at the edge.

    Args:
        grids: Any number of them.
        rows: Their new height.
        columns: Their new width.
        weigh: What a cell counts by its distance from the middle of a new one.
    """
    count, height, across, width = grids.shape
    by_row = mx.array(shares(height, rows, weigh)) @ grids.astype(mx.float32).reshape(count, height, across * width)
    by_cell = mx.array(shares(across, columns, weigh)) @ by_row.reshape(count * rows, across, width)
    return by_cell.reshape(count, rows, columns, width)


def shares(old: int, new: int, weigh: Weigh = linear) -> Float32[np.ndarray, "new old"]:
    """Return the part that each old cell has in a new one along one axis."""
    middles = (np.arange(new) + 0.5) * old / new - 0.5
    found = np.zeros((new, old), np.float32)
    for step in range(-1, 3):
        cells = np.floor(middles).astype(np.int64) + step
        np.add.at(found, (np.arange(new), np.clip(cells, 0, old - 1)), weigh(middles - cells).astype(np.float32))
    return found


def antialiased(
    grids: Float[mx.array, "grids rows columns width"], rows: int, columns: int
) -> Float[mx.array, "grids new_rows new_columns width"]:
    """Return grids of another size, each new cell a cubic mean of the old ones that it covers.

    Args:
        grids: Any number of them.
        rows: Their new height.
        columns: Their new width.
    """
    if grids.shape[1:3] == (rows, columns):
        return grids
    down, across = mx.array(covered(grids.shape[1], rows)), mx.array(covered(grids.shape[2], columns))
    return mx.einsum("ri,gijd,cj->grcd", down, grids.astype(mx.float32), across)


def covered(old: int, new: int) -> Float32[np.ndarray, "new old"]:
    """Return the part that each old cell has in a new one along one axis; it may cover many (Keys, -0.5)."""
    middles = (np.arange(new) + 0.5) * old / new
    distance = np.abs(np.arange(old) + 0.5 - middles[:, None]) / max(old / new, 1)
    inner = (1.5 * distance - 2.5) * distance**2 + 1
    outer = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weight = np.where(distance < 1, inner, np.where(distance < 2, outer, 0))
    found: np.ndarray = (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
    return found

"""Linear layers on few rows."""

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.kernels.dispatch.verdict import Accepted, Rejected
from metal_kernels.linear_weights import LinearWeights
from metal_kernels.stacked_weights import StackedWeights

_MAX_LINEAR_ROWS = 32  # beyond, MLX's own matmuls are faster
_LINEAR_CODES = (4, 8)  # bits
_LINEAR_THREADGROUPS = 132  # that are under way at once
_LONG_CHUNKS = 256  # of an inner axis whose rows, read by every threadgroup, take longer than the weights


@dataclass(frozen=True)
class LinearVariant:
    """How a linear layer on few rows is laid out; the names are the body's.

    Args:
        tiles: Rows of the weight that a threadgroup takes, in units of 16.
        columns: Rows of the input, in units of 8.
        simdgroups: SIMD-groups of a threadgroup: they share the inner axis.
        depth: Loads of weights that a lane has under way for each row of a tile.
    """

    tiles: int
    columns: int
    simdgroups: int
    depth: int


def linear_kernel(
    target: Target, dtype: mx.Dtype, weights: LinearWeights, rows: int, *, normed: bool = False, gated: bool = False
) -> Accepted[LinearVariant] | Rejected:
    """Decide on the kernel of a linear layer on ``rows`` rows, after a norm or with half of its outputs as gates."""
    if target != "cuda":
        return Rejected(f"the target is {target}; the layout was timed on CUDA alone, where MLX's launches cost most")
    if dtype not in (mx.float16, mx.bfloat16) or (normed and dtype == mx.float16):
        return Rejected(f"rows are {dtype}; the kernel takes float16 or, where it weighs a norm's input, bfloat16")
    if rows > _MAX_LINEAR_ROWS:
        return Rejected(f"{rows} rows; beyond {_MAX_LINEAR_ROWS} MLX's own matmuls are faster")
    if weights.bits is None and weights.weight.dtype != dtype:
        return Rejected(f"the weight is {weights.weight.dtype}, rows are {dtype}; the kernel takes both alike")
    if weights.bits is not None and (weights.bits not in _LINEAR_CODES or weights.biases is None):
        return Rejected(f"codes of {weights.bits} bits; the kernel takes {_LINEAR_CODES}, with scales and biases")
    run = 8 if weights.bits is None else 128 // weights.bits
    if weights.inputs % (4 * run) or weights.outputs % (32 if gated else 16) or weights.group_size % run:
        return Rejected(
            f"{weights.outputs} x {weights.inputs} weights in groups of {weights.group_size}; the kernel takes "
            f"multiples of {32 if gated else 16} and {4 * run}, and groups of whole runs of {run}"
        )
    chunks = weights.inputs // (4 * run)
    plain = weights.bits is None
    return Accepted(linear_variant(rows, chunks, weights.outputs, gated, plain=plain, normed=normed))


def linear_variant(
    rows: int, chunks: int, outputs: int, gated: bool, *, plain: bool = True, normed: bool = False
) -> LinearVariant:
    """Lay out a linear layer whose inner axis has so many chunks, so that its threadgroups are there at once."""
    columns = next(columns for columns in (1, 2, 4) if 8 * columns >= rows)
    whole = [tiles for tiles in (1, 2, 3, 4) if outputs % (16 * tiles) == 0]
    tiles = next((tiles for tiles in whole if outputs <= 16 * tiles * _LINEAR_THREADGROUPS), 2 if 2 in whole else 1)
    simdgroups = 16 if tiles == 1 and chunks >= 32 else 8
    if plain and columns == 4:
        # Each threadgroup reads all rows: of large layers fewer threadgroups, with more of the weight each, read less.
        if tiles == 2 and outputs > 16 * 4 * _LINEAR_THREADGROUPS and 4 in whole:
            tiles = 4
        elif tiles == 1 and chunks >= _LONG_CHUNKS and 2 in whole and not normed:
            return LinearVariant(2, columns, simdgroups, 2)
    turns = -(-chunks // simdgroups)
    # Loads of three tiles at once take registers that lanes need otherwise; of 16 SIMD-groups a lane has 128 at most.
    few = tiles > 2 or (simdgroups == 16 and columns == 4)
    depths = (2, 1) if few else (4, 2, 3, 1)
    depth = next((depth for depth in depths if turns % depth == 0), 1)
    return LinearVariant(tiles, columns, simdgroups, depth)


def head_linear_kernel(
    target: Target, dtype: mx.Dtype, weights: StackedWeights, rows: int
) -> Accepted[LinearVariant] | Rejected:
    """Decide on the kernel of a linear layer for each head of ``rows`` rows."""
    linear = linear_kernel(target, dtype, weights.first, rows)
    if isinstance(linear, Rejected):
        return linear
    heads, outputs, inputs = weights.shape
    chunks = inputs // (32 if weights.bits is None else 512 // weights.bits)
    tiles = next(
        tiles
        for tiles in (4, 2, 1)
        if tiles == 1 or (outputs % (16 * tiles) == 0 and heads * outputs >= 128 * 16 * tiles)
    )
    simdgroups = next(simdgroups for simdgroups in (8, 4, 2) if simdgroups == 2 or simdgroups <= chunks)
    depth = 2 if tiles < 4 and chunks >= 2 * simdgroups else 1
    return Accepted(LinearVariant(tiles, linear.variant.columns, simdgroups, depth))

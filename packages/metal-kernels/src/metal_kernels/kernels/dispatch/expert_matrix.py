"""Feed-forward parts of experts on matrix units."""

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.kernels.dispatch.verdict import Accepted, Rejected
from metal_kernels.stacked_weights import StackedWeights

MOST_ROWS = 64
"""Rows of a step; beyond, MLX's own matmuls are faster."""

_CODES = (4, 8)  # bits
_FEW_ROWS = 16
_SIMDGROUPS = 8


@dataclass(frozen=True)
class ExpertMatrixVariant:
    """How linear layers of experts are laid out on matrix units; the names are the body's.

    Args:
        tiles: Rows of the weights that a threadgroup takes, in units of 16.
        columns: Rows that it multiplies them with at once, in units of 8.
        simdgroups: SIMD-groups of a threadgroup: they share the inner axis.
        depth: Loads of weights that a lane has under way for each row of a tile.
    """

    tiles: int
    columns: int
    simdgroups: int
    depth: int


def expert_matrix_kernel(
    target: Target, dtype: mx.Dtype, weights: StackedWeights, tokens: int, chosen: int, *, gated: bool
) -> Accepted[ExpertMatrixVariant] | Rejected:
    """Decide on matrix units for ``tokens`` rows with ``chosen`` experts each; ``gated`` takes two such weights."""
    if target != "cuda":
        return Rejected(f"the target is {target}; the layout was timed on CUDA alone")
    if dtype not in (mx.float16, mx.bfloat16):
        return Rejected(f"rows are {dtype}; the kernel takes float16 or bfloat16")
    if weights.bits is None and weights.weight.dtype != dtype:
        return Rejected(f"the weights are {weights.weight.dtype}, rows are {dtype}; the kernel takes both alike")
    if weights.bits is not None and (weights.bits not in _CODES or weights.biases is None):
        return Rejected(f"codes of {weights.bits} bits; the kernel takes {_CODES}, with scales and biases")
    experts, outputs, inputs = weights.shape
    run = 8 if weights.bits is None else 128 // weights.bits
    if inputs % (4 * run) or outputs % 16 or weights.group_size % run:
        return Rejected(
            f"{outputs} x {inputs} weights in groups of {weights.group_size}; the kernel takes multiples of 16 and "
            f"{4 * run}, and groups of whole runs of {run}"
        )
    if not 0 < tokens <= MOST_ROWS:
        return Rejected(f"{tokens} rows; for more than {MOST_ROWS} MLX's matmuls are faster")
    if weights.bits is None and tokens <= _FEW_ROWS:
        return Rejected(f"{tokens} rows; up to {_FEW_ROWS} the kernel on vectors was timed, with plain weights")
    wanted = (2, 1) if gated else (4, 2, 1)
    tiles = next(tiles for tiles in wanted if outputs % ((8 if gated else 16) * tiles) == 0)
    columns = next(columns for columns in (1, 2, 4) if columns == 4 or 4 * columns * experts >= tokens * chosen)
    turns = -(-inputs // (_SIMDGROUPS * 4 * run))
    depth = next(depth for depth in (4 if gated else 2, 2, 1) if depth <= turns)
    return Accepted(ExpertMatrixVariant(tiles, columns, _SIMDGROUPS, depth))

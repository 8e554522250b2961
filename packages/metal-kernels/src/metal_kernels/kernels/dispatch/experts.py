"""Experts on few rows."""

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.kernels.dispatch.rows import RowKernels
from metal_kernels.kernels.dispatch.verdict import FLOAT_DTYPES, MIN_CHANNELS, Accepted, Rejected

_MAX_EXPERTS = 1024
_MAX_EXPERT_ROWS = 64
_FEW_EXPERT_ROWS = 16
_LARGE_EXPERT = 2**21  # elements of a weight


@dataclass(frozen=True)
class ExpertVariant:
    """How linear layers of experts are laid out.

    Args:
        rows: Rows of two weights that a SIMD-group takes at once; of one weight it takes twice as many.
        simdgroups: SIMD-groups of a threadgroup.
        turns: How often it does so: looking for the rows of an expert costs as much as some turns.
    """

    rows: int
    simdgroups: int
    turns: int


def routing_kernel(target: Target, dtype: mx.Dtype, experts: int) -> Accepted[RowKernels] | Rejected:
    """Decide on the kernel that chooses among so many experts."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"logits are {dtype}; kernels know float16, bfloat16 and float32")
    if not MIN_CHANNELS <= experts <= _MAX_EXPERTS:
        return Rejected(f"{experts} experts; a SIMD-group holds {MIN_CHANNELS} to {_MAX_EXPERTS} logits")
    return Accepted(RowKernels())


def expert_kernel(
    target: Target, dtype: mx.Dtype, weight_dtype: mx.Dtype, shape: tuple[int, ...], tokens: int
) -> Accepted[ExpertVariant] | Rejected:
    """Decide on the kernel for weights of ``shape`` ``[experts, output, input]`` and a step of ``tokens`` rows."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES or weight_dtype != dtype:
        return Rejected(f"rows are {dtype}, weights {weight_dtype}; the kernel takes both in one float type")
    _, output, size = shape
    if output % 4 or size % 8:
        return Rejected(f"weights of {output} rows of {size} elements; the kernel takes multiples of 4 and of 8")
    if not 0 < tokens <= _MAX_EXPERT_ROWS:
        return Rejected(f"{tokens} rows; for more than {_MAX_EXPERT_ROWS} matrix units are faster")
    if target == "metal" and tokens > _FEW_EXPERT_ROWS and output * size > _LARGE_EXPERT:
        return Rejected(f"{tokens} rows of experts of {output} x {size}; MLX's grouped matmul has matrix units")
    return Accepted(ExpertVariant(rows=2, simdgroups=4, turns=1 if tokens <= _FEW_EXPERT_ROWS else 4))

"""Kernels that move or change rows, whatever heads they have."""

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.kernels.dispatch.verdict import FLOAT_DTYPES, Accepted, Rejected

_MAX_WIDTH = 32768  # elements of a row that a threadgroup holds in registers


@dataclass(frozen=True)
class PageKernels:
    """Writes, copies and gathers: they know no head size."""


@dataclass(frozen=True)
class RowKernels:
    """Norms and activations of a step's rows."""


def page_kernels(target: Target, dtype: mx.Dtype, size: int) -> Accepted[PageKernels] | Rejected:
    """Decide on the kernels that move rows and blocks of a cache of ``size`` elements."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"the cache is {dtype}; kernels know float16, bfloat16 and float32")
    if size < 8:
        return Rejected("MLX passes a cache of fewer than 8 elements as constant memory, which cannot be written")
    return Accepted(PageKernels())


def row_kernels(target: Target, dtype: mx.Dtype, width: int) -> Accepted[RowKernels] | Rejected:
    """Decide on the kernels between matmuls, for rows of ``width`` elements."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"rows are {dtype}; kernels know float16, bfloat16 and float32")
    if width % 4 or not 8 <= width <= _MAX_WIDTH:
        return Rejected(f"rows of {width} elements; kernels take multiples of 4 from 8 to {_MAX_WIDTH}")
    return Accepted(RowKernels())

"""One token of recurrent layers."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.gated_delta_rows import GatedDeltaRows
from metal_kernels.kernels.dispatch.rows import RowKernels
from metal_kernels.kernels.dispatch.verdict import FLOAT_DTYPES, MIN_CHANNELS, Accepted, Rejected
from metal_kernels.mamba2_rows import Mamba2Rows

_MAX_DELTA_KEY = 256  # elements, of which a lane holds an eighth of two vectors and of some rows
_MAX_STATE_SIZE = 256  # likewise


@dataclass(frozen=True)
class GatedDeltaVariant:
    """How one token of a gated delta net is laid out.

    Args:
        simdgroups: SIMD-groups of a threadgroup, which has a key head: each takes 4 rows of its memory at a time.
        unrolled: Rows that a lane loads its part of before it uses one.
    """

    simdgroups: int
    unrolled: int


@dataclass(frozen=True)
class MemoryVariant:
    """How one token of a selective state space is laid out.

    Args:
        simdgroups: SIMD-groups of a threadgroup, which has a head: each takes 4 values at a time.
        unrolled: Values of which a lane loads its part of the memory before it uses one.
    """

    simdgroups: int
    unrolled: int


@cache
def gated_delta_kernel(
    target: Target, dtype: mx.Dtype, page_words: int, rows: GatedDeltaRows
) -> Accepted[GatedDeltaVariant] | Rejected:
    """Decide on one token of a gated delta net, over pages of ``page_words`` words."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"rows are {dtype}; kernels know float16, bfloat16 and float32")
    if rows.k_size % 32 or rows.v_size % 32 or rows.k_size > _MAX_DELTA_KEY or rows.v_heads % rows.k_heads:
        return Rejected(
            f"keys of {rows.k_size} and values of {rows.v_size} elements, {rows.v_heads} value heads for "
            f"{rows.k_heads} key heads; the kernel takes multiples of 32 up to {_MAX_DELTA_KEY}, and of the key heads"
        )
    history_words, _ = rows.state_words(dtype)
    if rows.taps < 2 or history_words % 4 or page_words % 4:
        return Rejected(
            f"{history_words} words before the memory in pages of {page_words}; the kernel loads 16 bytes at a time"
        )
    values = rows.v_heads // rows.k_heads * rows.v_size
    layouts = ((16, 2), (8, 2), (8, 1)) if target == "cuda" else ((8, 2), (8, 1))
    simdgroups, unrolled = next(layout for layout in layouts if values % (4 * layout[0] * layout[1]) == 0)
    return Accepted(GatedDeltaVariant(simdgroups, unrolled))


def short_conv_kernel(target: Target, dtype: mx.Dtype, width: int, taps: int) -> Accepted[RowKernels] | Rejected:
    """Decide on one token of a gated short convolution of ``width`` channels."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"rows are {dtype}; kernels know float16, bfloat16 and float32")
    if taps < 2 or (taps - 1) * width * dtype.size % 4 or width < MIN_CHANNELS:
        return Rejected(
            f"{taps} taps of {width} channels; a state has whole words, of at least {MIN_CHANNELS} channels"
        )
    return Accepted(RowKernels())


@cache
def mamba2_kernel(
    target: Target, dtype: mx.Dtype, page_words: int, rows: Mamba2Rows
) -> Accepted[MemoryVariant] | Rejected:
    """Decide on one token of a Mamba 2 layer, over pages of ``page_words`` words."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"rows are {dtype}; kernels know float16, bfloat16 and float32")
    if rows.state_size % 32 or rows.state_size > _MAX_STATE_SIZE or rows.heads % rows.groups or rows.head_size % 4:
        return Rejected(
            f"{rows.state_size} numbers for each of {rows.head_size} values, {rows.heads} heads in {rows.groups} "
            f"groups; the kernel takes multiples of 32 up to {_MAX_STATE_SIZE}, multiples of 4, and whole groups"
        )
    history_words, _ = rows.state_words(dtype)
    if rows.taps < 2 or history_words % 4 or page_words % 4:
        return Rejected(
            f"{history_words} words before the memory in pages of {page_words}; the kernel loads 16 bytes at a time"
        )
    layouts = ((16, 1), (8, 2), (8, 1), (4, 1), (2, 1), (1, 1))
    simdgroups, unrolled = next(layout for layout in layouts if rows.head_size % (4 * layout[0] * layout[1]) == 0)
    return Accepted(MemoryVariant(simdgroups, unrolled))

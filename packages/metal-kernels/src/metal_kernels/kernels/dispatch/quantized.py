"""Writes of quantised rows, and decode over them."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.kernels.dispatch.decode import MatrixVariant
from metal_kernels.kernels.dispatch.rows import PageKernels
from metal_kernels.kernels.dispatch.verdict import FLOAT_DTYPES, HEAD_SIZES, Accepted, Rejected
from metal_kernels.row_format import RowFormat

_MAX_QUANTIZED_HEAD = 256  # elements that a SIMD-group quantises, 8 a lane
_MAX_QUANTIZED_SHARED = 1024  # floats of output of a SIMD-group, where four put them into threadgroup memory
_MAX_MATRIX_SHARED = {8: 768, 4: 1984}  # likewise, on matrix units, by SIMD-groups; Metal has 32 KB for all


@dataclass(frozen=True)
class QuantizedVariant:
    """How decode over quantised rows is laid out; the names are the body's.

    Args:
        heads: Query heads of one threadgroup.
        lanes: Lanes that share a key.
        width: Elements of a head that a lane holds.
        simdgroups: SIMD-groups of a threadgroup.
        unrolled: Keys that a lane loads before it uses one.
        parts: Threadgroups that share the query heads of one key head.
    """

    heads: int
    lanes: int
    width: int
    simdgroups: int
    unrolled: int
    parts: int

    @property
    def template(self) -> dict[str, int | mx.Dtype]:
        """Template values of the body."""
        return {
            "HEADS": self.heads,
            "LANES": self.lanes,
            "WIDTH": self.width,
            "SIMDGROUPS": self.simdgroups,
            "UNROLLED": self.unrolled,
        }


@cache
def quantized_write_kernel(target: Target, row_format: RowFormat, size: int) -> Accepted[PageKernels] | Rejected:
    """Decide on the kernel that quantises rows into a cache of ``size`` words."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if size < 8:
        return Rejected("MLX passes a cache of fewer than 8 elements as constant memory, which cannot be written")
    if row_format.head_size > _MAX_QUANTIZED_HEAD:
        return Rejected(f"head size {row_format.head_size} is more than a SIMD-group holds ({_MAX_QUANTIZED_HEAD})")
    return Accepted(PageKernels())


@cache
def quantized_decode_kernel(
    target: Target, query_dtype: mx.Dtype, row_format: RowFormat, group: int
) -> Accepted[QuantizedVariant | MatrixVariant] | Rejected:
    """Decide on decode over quantised rows for ``group`` query heads per key head."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if query_dtype not in FLOAT_DTYPES:
        return Rejected(f"query is {query_dtype}; kernels know float16, bfloat16 and float32")
    head_size = row_format.head_size
    if head_size not in HEAD_SIZES:
        return Rejected(f"head size {head_size} is not one of {HEAD_SIZES}")
    eight_bits = {row_format.key, row_format.value} <= {"int8", "fp8_e4m3"}
    # Matrices are of float16, for rows of whole 16-byte words.
    if eight_bits and query_dtype != mx.float32 and row_format.row_words % 4 == 0:
        parts = -(-group // 8)
        heads = -(-group // parts)
        return Accepted(MatrixVariant(heads, _matrix_simdgroups(heads * head_size), 1, parts))
    # More heads of a threadgroup need more registers for each element; fewer elements leave room for them.
    width = 16 if group <= 2 else 8
    lanes = next(lanes for lanes in (4, 8, 16, 32) if lanes * width >= head_size)
    parts = -(-group // max(1, min(8, _MAX_QUANTIZED_SHARED // head_size)))
    return Accepted(QuantizedVariant(-(-group // parts), lanes, width, 4, 2, parts))


def _matrix_simdgroups(shared: int) -> int:
    """Return as many SIMD-groups as have room for ``shared`` floats of output each."""
    return next((count for count, most in _MAX_MATRIX_SHARED.items() if shared <= most), 2)

"""Paged decode."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.kernels.dispatch.verdict import BLOCK_SIZES, FLOAT_DTYPES, HEAD_SIZES, Accepted, Rejected

_LOAD_BYTES = 16  # what a lane loads at once where the head size allows it
_MAX_HELD = 32  # floats of the query that a lane holds: as many for the output, and the keys beside them
_MATRIX_GROUP = 3  # query heads of a key head; with fewer, memory limits plain arithmetic too
_FEW_MATRIX_HEADS = 4  # that eight SIMD-groups join in little threadgroup memory
_MATRIX_HEAD_SIZES = (64, 128)  # halves of which fill the runs of four lanes
_MAX_SHARED = 512  # floats of output that a SIMD-group puts into threadgroup memory for eight of them to fit


@dataclass(frozen=True)
class DecodeVariant:
    """How paged decode is laid out; the names are the body's.

    Args:
        heads: Query heads of one threadgroup.
        lanes: Lanes that share a key.
        simdgroups: SIMD-groups of a threadgroup.
        unrolled: Keys that a lane loads before it uses one.
        parts: Threadgroups that share the query heads of one key head.
        ahead: Rounds between loading keys and using them, 0 or 1.
    """

    heads: int
    lanes: int
    simdgroups: int
    unrolled: int
    parts: int
    ahead: int = 0

    @property
    def template(self) -> dict[str, int | mx.Dtype]:
        """Template values of the body."""
        return {
            "HEADS": self.heads,
            "LANES": self.lanes,
            "SIMDGROUPS": self.simdgroups,
            "UNROLLED": self.unrolled,
            "AHEAD": self.ahead,
        }


@dataclass(frozen=True)
class MatrixVariant:
    """How decode on matrix units is laid out; the names are the body's.

    Args:
        heads: Query heads of one threadgroup, at most 8.
        simdgroups: SIMD-groups of a threadgroup.
        tiles: Tiles of 16 keys that a SIMD-group takes at once.
        parts: Threadgroups that share the query heads of one key head.
    """

    heads: int
    simdgroups: int
    tiles: int
    parts: int

    @property
    def template(self) -> dict[str, int | mx.Dtype]:
        """Template values of the body."""
        return {"HEADS": self.heads, "SIMDGROUPS": self.simdgroups, "TILES": self.tiles}


@cache
def decode_kernel(
    target: Target,
    query_dtype: mx.Dtype,
    cache_dtype: mx.Dtype,
    head_size: int,
    block_size: int,
    group: int,
) -> Accepted[DecodeVariant | MatrixVariant] | Rejected:
    """Decide on paged decode for ``group`` query heads per key head."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if query_dtype not in FLOAT_DTYPES or cache_dtype not in FLOAT_DTYPES:
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; kernels know float16, bfloat16 and float32")
    if head_size not in HEAD_SIZES:
        return Rejected(f"head size {head_size} is not one of {HEAD_SIZES}")
    if block_size not in BLOCK_SIZES:
        return Rejected(f"block size {block_size} is not one of {BLOCK_SIZES}")
    few = group < _MATRIX_GROUP or head_size not in _MATRIX_HEAD_SIZES
    if target != "cuda" or few or query_dtype != cache_dtype or cache_dtype == mx.float32:
        return Accepted(decode_variant(target, cache_dtype, head_size, group))
    parts = -(-group // 8)
    heads = -(-group // parts)
    simdgroups, tiles = (8, 1) if heads <= _FEW_MATRIX_HEADS else (2, 2)
    return Accepted(MatrixVariant(heads, simdgroups, tiles, parts))


def write_decode_kernel(
    target: Target,
    query_dtype: mx.Dtype,
    cache_dtype: mx.Dtype,
    head_size: int,
    block_size: int,
    group: int,
) -> Accepted[DecodeVariant | MatrixVariant] | Rejected:
    """Decide on paged decode that writes its rows' keys and values itself."""
    decode = decode_kernel(target, query_dtype, cache_dtype, head_size, block_size, group)
    if isinstance(decode, Accepted) and decode.variant.parts > 1:
        return Rejected(f"{decode.variant.parts} threadgroups share a key head; which of them would write it is open")
    return decode


def rope_decode_kernel(
    target: Target,
    query_dtype: mx.Dtype,
    cache_dtype: mx.Dtype,
    head_size: int,
    block_size: int,
    group: int,
    rotary: int,
    traditional: bool,
) -> Accepted[DecodeVariant | MatrixVariant] | Rejected:
    """Decide on paged decode that rotates and writes its rows itself; ``rotary`` elements of a head rotate."""
    if rotary != head_size or traditional:
        return Rejected(f"{rotary} of {head_size} elements rotate; the kernel rotates the halves of whole heads")
    if query_dtype != cache_dtype:
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; the kernel takes both alike")
    return write_decode_kernel(target, query_dtype, cache_dtype, head_size, block_size, group)


def decode_variant(target: Target, cache_dtype: mx.Dtype, head_size: int, group: int) -> DecodeVariant:
    """Lay out paged decode so that lanes load whole words and hold their share in registers."""
    width = _LOAD_BYTES // cache_dtype.size
    lanes = next((lanes for lanes in (8, 16, 32) if head_size % lanes == 0 and head_size // lanes <= width), 8)
    while head_size % (lanes * 2) == 0 and lanes < 32 and head_size // lanes > _MAX_HELD // 2:
        lanes *= 2
    held = head_size // lanes
    parts = -(-group // max(1, _MAX_HELD // held))
    heads = -(-group // parts)
    simdgroups = 8 if heads * head_size <= _MAX_SHARED else 4
    if target == "cuda" and cache_dtype.size == 2:
        if heads > 2 and held <= 8 and lanes > 8:  # bound by shuffles: fewer lanes for each key need fewer
            return DecodeVariant(heads, lanes // 2, 4, 2, parts, ahead=1)
        return DecodeVariant(heads, lanes, simdgroups, 4 if held <= 8 else 2, parts, ahead=1)
    return DecodeVariant(heads, lanes, simdgroups, 4 if held <= 8 else 2, parts)

"""Requests with several rows."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.kernels.dispatch.verdict import HEAD_SIZES, Accepted, Rejected

_FUSED_HEAD_SIZES = (64, 80, 96, 128)
_MAX_TILED_HEAD = 192  # beyond, four SIMD-groups' keys and values exceed threadgroup memory
_TILED_KEY = 0.06  # per key of the longest request, however few rows see it
_TILED_RATE = 1.2e8
_FUSED_REQUEST = 45.0
_FUSED_RATE = 5.5e8
_COPIED_ELEMENT = 2e-5


@dataclass(frozen=True)
class PrefillVariant:
    """How tiled prefill is laid out.

    Args:
        simdgroups: SIMD-groups of a threadgroup: each has 16 rows, and 8 keys of a tile.
    """

    simdgroups: int


@dataclass(frozen=True)
class GatheredPrefill:
    """MLX's fused attention, request by request, over the step's own rows or copies of pages."""


@cache
def prefill_kernel(
    target: Target, query_dtype: mx.Dtype, cache_dtype: mx.Dtype, head_size: int
) -> Accepted[PrefillVariant] | Rejected:
    """Decide on the kernel for requests with several rows."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if query_dtype != cache_dtype or query_dtype not in (mx.float16, mx.bfloat16):
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; the kernel takes both as float16 or bfloat16")
    if head_size not in HEAD_SIZES:
        return Rejected(f"head size {head_size} is not one of {HEAD_SIZES}")
    return Accepted(PrefillVariant(simdgroups=4 if head_size <= _MAX_TILED_HEAD else 2))


@dataclass(frozen=True)
class PrefillWork:
    """What requests with several rows ask of attention.

    Args:
        reqs: Number of requests.
        rows: Of all of them.
        keys: To be copied out of pages, of all of them.
        pairs: Of rows and keys that they see, in all of them.
        longest: Keys of the longest request.
    """

    reqs: int
    rows: int
    keys: int
    pairs: int
    longest: int

    def tiled_time(self, q_heads: int, head_size: int) -> float:
        """Estimated microseconds of the tiled kernel; measured with CUDA."""
        return max(_TILED_KEY * self.longest, 4 * self.pairs * q_heads * head_size / _TILED_RATE)

    def gathered_time(self, q_heads: int, kv_heads: int, head_size: int) -> float:
        """Estimated microseconds of copies and MLX's fused attention; measured with CUDA."""
        copies = _COPIED_ELEMENT * self.keys * kv_heads * head_size
        return _FUSED_REQUEST * self.reqs + copies + 4 * self.pairs * q_heads * head_size / _FUSED_RATE


def gathered_prefill(
    target: Target,
    query_dtype: mx.Dtype,
    cache_dtype: mx.Dtype,
    heads: tuple[int, int, int],
    work: PrefillWork,
    masked: bool,
) -> Accepted[GatheredPrefill] | Rejected:
    """Decide on copies of keys and values and MLX's fused attention.

    ``heads`` are query heads, key heads and head size; ``masked`` is whether scores are capped or a window hides keys.
    """
    q_heads, kv_heads, head_size = heads
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if masked:
        return Rejected("MLX's fused attention has no soft cap, and a window only as an array")
    if query_dtype != cache_dtype or query_dtype not in (mx.float16, mx.bfloat16):
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; MLX fuses float16 and bfloat16")
    if head_size not in _FUSED_HEAD_SIZES:
        return Rejected(f"head size {head_size} is not one of {_FUSED_HEAD_SIZES}, which MLX fuses")
    tiled, gathered = work.tiled_time(q_heads, head_size), work.gathered_time(q_heads, kv_heads, head_size)
    if tiled <= gathered:
        return Rejected(
            f"tiled attention is estimated at {tiled:.0f} us, copies and fused attention at {gathered:.0f}"
        )
    return Accepted(GatheredPrefill())

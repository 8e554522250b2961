"""Decode over latent rows."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.kernels.dispatch.verdict import Accepted, Rejected

_MAX_LATENT_ROW = 768  # elements, of which threadgroup memory holds 16 rows


@dataclass(frozen=True)
class LatentVariant:
    """How decode over latent rows is laid out.

    Args:
        heads: Query heads of one threadgroup: the rows of a matrix.
        keys: Rows of the cache in threadgroup memory.
        simdgroups: SIMD-groups of a threadgroup.
    """

    heads: int
    keys: int
    simdgroups: int


@cache
def mla_decode_kernel(
    target: Target, query_dtype: mx.Dtype, cache_dtype: mx.Dtype, latent_size: int, rope_size: int
) -> Accepted[LatentVariant] | Rejected:
    """Decide on decode over latent rows."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if query_dtype != cache_dtype or query_dtype not in (mx.float16, mx.bfloat16):
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; the kernel takes both as float16 or bfloat16")
    variant = LatentVariant(heads=16, keys=16, simdgroups=4)
    if latent_size % (16 * variant.simdgroups) or rope_size % 16:
        return Rejected(
            f"latent size {latent_size} and rope size {rope_size}; the kernel takes multiples of "
            f"{16 * variant.simdgroups} and 16"
        )
    if latent_size + rope_size > _MAX_LATENT_ROW:
        return Rejected(f"rows of {latent_size + rope_size} elements; threadgroup memory holds {_MAX_LATENT_ROW}")
    return Accepted(variant)

"""Attention over latent rows."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.kernels.dispatch.prefill import PrefillVariant, prefill_kernel
from metal_kernels.kernels.dispatch.verdict import BLOCK_SIZES, Accepted, Rejected

_MAX_EXPANDED = 2**30  # elements of keys and values that are made from latents
_MAX_BIAS = 2**28  # elements of scores that are added to others
_MAX_BIASED_ROWS = 2048
_SHORT_PROMPT = 512  # rows of a request; of shorter ones launches take longer than attention
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


@dataclass(frozen=True)
class ExpandedPrefill:
    """How prompts attend to keys and values made from their latents.

    Args:
        tiled: Layout of the kernel over pages, which takes all requests at once; None for MLX's fused attention, one
            request after the other.
        rows: Of a request that MLX takes at once.
    """

    tiled: PrefillVariant | None
    rows: int


@dataclass(frozen=True)
class LatentPrompts:
    """What requests with several rows ask of latent attention.

    Args:
        reqs: Number of requests.
        rows: Of all of them.
        keys: Of all of them.
        pairs: Of rows and keys that they see, in all of them.
        longest: Keys of the longest request.
        block_size: Tokens of a block.
    """

    reqs: int
    rows: int
    keys: int
    pairs: int
    longest: int
    block_size: int


def expanded_prefill(
    target: Target,
    query_dtype: mx.Dtype,
    cache_dtype: mx.Dtype,
    q_heads: int,
    sizes: tuple[int, int, int, int],
    prompts: LatentPrompts,
) -> Accepted[ExpandedPrefill] | Rejected:
    """Decide on keys and values made from latents, where queries could be absorbed instead.

    ``sizes`` are those of a latent, of a key's two parts, the rotary one last, and of a value.
    """
    latent_size, nope_size, rope_size, value_size = sizes
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if query_dtype != cache_dtype or query_dtype not in (mx.float16, mx.bfloat16):
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; MLX fuses float16 and bfloat16")
    head_size = nope_size + rope_size
    elements = prompts.keys * q_heads * (head_size + max(head_size, value_size))
    if elements > _MAX_EXPANDED:
        return Rejected(f"keys and values of {elements} elements; at most {_MAX_EXPANDED} are made at once")
    made = prompts.keys * latent_size * (nope_size + value_size)
    expanded, absorbed = made + prompts.pairs * (head_size + value_size), prompts.pairs * (2 * latent_size + rope_size)
    if absorbed <= expanded:
        return Rejected(f"{absorbed} products of absorbed queries for each head are fewer than {expanded}")
    rows = min(_MAX_BIASED_ROWS, max(128, _MAX_BIAS // (q_heads * prompts.longest)))
    tiled = prefill_kernel(target, query_dtype, cache_dtype, head_size)
    short = prompts.rows < _SHORT_PROMPT * prompts.reqs
    if short and isinstance(tiled, Accepted) and value_size <= head_size and prompts.block_size in BLOCK_SIZES:
        return Accepted(ExpandedPrefill(tiled.variant, rows))
    return Accepted(ExpandedPrefill(None, rows))

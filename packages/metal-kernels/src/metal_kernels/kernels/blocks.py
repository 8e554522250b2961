"""Whole blocks, gathered from the cache and copied within it."""

from math import prod

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.kernels.source import PortableKernel, order_input

_THREADS = 256
_GATHER = PortableKernel(
    "gather_blocks", ("kv_cache_in", "blocks_in", "order_in"), ("pages_out",), "gather_blocks.metal"
)
_GATHER_HALVES = PortableKernel(
    "gather_halves", ("kv_cache_in", "blocks_in", "order_in"), ("pages_out",), "gather_halves.metal"
)
_SCATTER = PortableKernel(
    "scatter_blocks", ("kv_cache_in", "pages_in", "blocks_in"), ("order_out",), "scatter_blocks.metal"
)


def gather_blocks(
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    block_ids: Int32[mx.array, "gathered"],
    order_token: mx.array | None,
) -> Float[mx.array, "gathered 2 block_size kv_heads head_size"]:
    """Return copies of ``block_ids``, read after ``order_token``."""
    shape = (block_ids.size, *kv_cache.shape[1:])
    if block_ids.size == 0:
        return mx.zeros(shape, kv_cache.dtype)
    (pages,) = _GATHER(
        [kv_cache, mx.contiguous(block_ids), order_input(order_token)],
        [(shape, kv_cache.dtype)],
        threadgroups=(block_ids.size, 1),
        threads=_THREADS,
        template={"PAGE_WORDS": _page_words(kv_cache), "THREADS": _THREADS},
    )
    return pages


def gather_halves(
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    block_ids: Int32[mx.array, "gathered"],
    order_token: mx.array | None,
) -> Float[mx.array, "2 gathered block_size kv_heads head_size"]:
    """Return the keys of ``block_ids`` and then their values, read after ``order_token``.

    The keys of a block are a multiple of 16 bytes; there is at least one block.
    """
    _, _, *half = kv_cache.shape
    (pages,) = _GATHER_HALVES(
        [kv_cache, mx.contiguous(block_ids), order_input(order_token)],
        [((2, block_ids.size, *half), kv_cache.dtype)],
        threadgroups=(block_ids.size, 2),
        threads=_THREADS,
        template={"HALF_WORDS": prod(half) * kv_cache.dtype.size // 16, "THREADS": _THREADS},
    )
    return pages


def copy_blocks(
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    src_blocks: Int32[mx.array, "pairs"],
    dst_blocks: Int32[mx.array, "pairs"],
    *,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "blocks 2 block_size kv_heads head_size"], mx.array]:
    """Copy whole blocks in place; see :func:`metal_kernels.copy_blocks`.

    Sources pass through a buffer of their own, so that a block may be a source and a destination.
    """
    if src_blocks.size == 0:
        return kv_cache, order_input(order_token)
    pages = gather_blocks(kv_cache, src_blocks, order_token)
    (written,) = _SCATTER(
        [kv_cache, pages, mx.contiguous(dst_blocks)],
        [((8,), mx.int32)],
        threadgroups=(dst_blocks.size, 1),
        threads=_THREADS,
        template={"T": kv_cache.dtype, "PAGE_WORDS": _page_words(kv_cache), "THREADS": _THREADS},
    )
    return kv_cache, written


def _page_words(kv_cache: mx.array) -> int:
    """Four-byte words of a page: keys and values together always fill whole ones."""
    return prod(kv_cache.shape[1:]) * kv_cache.dtype.size // 4

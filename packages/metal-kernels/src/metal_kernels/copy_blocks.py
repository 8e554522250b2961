"""Copying whole cache pages."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import reference


def copy_blocks(
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    src_blocks: Int32[mx.array, "pairs"],
    dst_blocks: Int32[mx.array, "pairs"],
    *,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "blocks 2 block_size kv_heads head_size"], mx.array]:
    """Copy page ``src_blocks[i]`` to page ``dst_blocks[i]``; all sources are read before any is overwritten.

    Args:
        kv_cache: Pages of one layer.
        src_blocks: Pages to read.
        dst_blocks: Pages to overwrite, no page twice.
        order_token: What the last write or read of these pages returned; the copy happens after it.

    Returns:
        The written pages, which replace ``kv_cache``, and an order token, as ``reshape_and_cache``.
    """
    return reference.copy_blocks(kv_cache, src_blocks, dst_blocks, order_token=order_token)

"""Copying whole cache blocks."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import kernels, reference
from metal_kernels.checks import require_kv_cache, require_rows


def copy_blocks(
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    src_blocks: Int32[mx.array, "pairs"],
    dst_blocks: Int32[mx.array, "pairs"],
    *,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "blocks 2 block_size kv_heads head_size"], mx.array]:
    """Copy block ``src_blocks[i]`` over block ``dst_blocks[i]``, for every pair at once.

    Every source is read before any destination is written. Destinations differ from each other.

    Args:
        kv_cache: Pages of one layer.
        src_blocks: Blocks to read.
        dst_blocks: Blocks to overwrite.
        order_token: Output of the last write or read of these blocks that must happen first.

    Returns:
        The cache to use from now on, and an order token for its readers.

    Raises:
        MetalKernelsError: There are not as many destinations as sources.
    """
    require_kv_cache("copy_blocks", kv_cache)
    require_rows("copy_blocks", "dst_blocks", dst_blocks, src_blocks.shape)
    if kernels.move_pages(kv_cache):
        return kernels.copy_blocks(kv_cache, src_blocks, dst_blocks, order_token=order_token)
    return reference.copy_blocks(kv_cache, src_blocks, dst_blocks, order_token=order_token)

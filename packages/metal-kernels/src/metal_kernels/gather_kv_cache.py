"""Reading one request's keys and values as contiguous arrays."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import reference
from metal_kernels.checks import require_kv_cache
from metal_kernels.errors import MetalKernelsError


def gather_kv_cache(
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    block_table: Int32[mx.array, "max_blocks"],
    seq_len: int,
) -> tuple[Float[mx.array, "context kv_heads head_size"], Float[mx.array, "context kv_heads head_size"]]:
    """Return the keys and values at positions 0 up to ``seq_len`` of one request.

    Args:
        kv_cache: Pages of one layer.
        block_table: The request's blocks in order, padded on the right.
        seq_len: Number of positions to read.

    Raises:
        MetalKernelsError: The table is too short for ``seq_len``.
    """
    require_kv_cache("gather_kv_cache", kv_cache)
    capacity = block_table.size * kv_cache.shape[2]
    if not 0 <= seq_len <= capacity:
        raise MetalKernelsError(
            f"[gather_kv_cache] expected seq_len of 0 to {capacity}, the tokens of {block_table.size} blocks, got "
            f"{seq_len}. Pass the request's whole block table row."
        )
    return reference.gather_kv_cache(kv_cache, block_table, seq_len)

"""Reading one request's cached keys and values as dense arrays."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import reference


def gather_kv_cache(
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    block_table: Int32[mx.array, "max_blocks"],
    seq_len: int,
) -> tuple[Float[mx.array, "context kv_heads head_size"], Float[mx.array, "context kv_heads head_size"]]:
    """Return the first ``seq_len`` keys and values of one request.

    Args:
        kv_cache: Pages of one layer.
        block_table: The request's pages in order; may be padded on the right.
        seq_len: Positions to return.
    """
    return reference.gather_kv_cache(kv_cache, block_table, seq_len)

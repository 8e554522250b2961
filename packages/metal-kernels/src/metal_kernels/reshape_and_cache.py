"""Writing new keys and values into cache pages."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import reference


def reshape_and_cache(
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    slot_mapping: Int32[mx.array, "tokens"],
) -> tuple[Float[mx.array, "blocks 2 block_size kv_heads head_size"], mx.array]:
    """Write each row's key and value at its slot: page ``slot // block_size``, offset ``slot % block_size``.

    Rows with a negative slot are skipped; no two rows may share a slot. Rows are converted to the cache's dtype.

    Returns:
        The written pages, which replace ``kv_cache``: keep no other reference to the old array, or MLX copies all
        of it. And an order token that readers of the pages take as an input.
    """
    return reference.reshape_and_cache(key, value, kv_cache, slot_mapping)

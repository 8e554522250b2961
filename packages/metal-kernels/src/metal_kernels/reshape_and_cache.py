"""Writing new keys and values into the cache."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import kernels, reference
from metal_kernels.checks import require_kv_cache, require_rows


def reshape_and_cache(
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    slot_mapping: Int32[mx.array, "tokens"],
) -> tuple[Float[mx.array, "blocks 2 block_size kv_heads head_size"], mx.array]:
    """Write each token's key and value at its slot.

    On a GPU the rows are written into ``kv_cache`` itself, once the order token is evaluated. Elsewhere the write
    costs the rows written, not the cache, if ``kv_cache`` is used as :mod:`metal_kernels.reference` says: replace the
    array you passed by the one returned, and keep no view of it.

    Args:
        key: New keys, in any float dtype; stored in the cache's.
        value: New values.
        kv_cache: Pages of one layer; ``[:, 0]`` are keys, ``[:, 1]`` values.
        slot_mapping: ``block * block_size + offset`` of each token. Rows with a negative slot are skipped.
            Slots of one call differ from each other.

    Returns:
        The cache that holds the rows, and an order token: pass it to whatever reads them.

    Raises:
        MetalKernelsError: A shape does not fit the cache.
    """
    require_kv_cache("reshape_and_cache", kv_cache)
    rows = (slot_mapping.size, *kv_cache.shape[3:])
    require_rows("reshape_and_cache", "key", key, rows)
    require_rows("reshape_and_cache", "value", value, rows)
    if kernels.move_pages(kv_cache):
        return kernels.reshape_and_cache(key, value, kv_cache, slot_mapping)
    return reference.reshape_and_cache(key, value, kv_cache, slot_mapping)

"""Reading and writing cache blocks with plain MLX operations."""

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32


def reshape_and_cache(
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    slot_mapping: Int32[mx.array, "tokens"],
) -> tuple[Float[mx.array, "blocks 2 block_size kv_heads head_size"], mx.array]:
    """Write rows at their slots; see :func:`metal_kernels.reshape_and_cache`.

    Returns a new array; the order token orders nothing here. ``slot_mapping`` is read back to the host,
    which costs nothing for an array made from host memory.
    """
    slots = np.asarray(slot_mapping)
    if slots.size == 0 or slots.min() < 0:
        kept = np.flatnonzero(slots >= 0)
        if kept.size == 0:
            return kv_cache, slot_mapping
        rows = mx.array(kept.astype(np.int32))
        key, value, slots = key[rows], value[rows], slots[kept]
    # Both halves in one scatter over the cache seen as rows: on a CPU half the time of one scatter each.
    block_size, kv_heads, head_size = kv_cache.shape[2:]
    key_rows = slots + slots // block_size * block_size
    written = kv_cache.reshape(-1, kv_heads, head_size)
    written[mx.array(np.concatenate([key_rows, key_rows + block_size]))] = mx.concatenate([key, value])
    return written.reshape(kv_cache.shape), slot_mapping


def copy_blocks(
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    src_blocks: Int32[mx.array, "pairs"],
    dst_blocks: Int32[mx.array, "pairs"],
    *,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "blocks 2 block_size kv_heads head_size"], mx.array]:
    """Copy whole blocks; see :func:`metal_kernels.copy_blocks`.

    Returns a new array. Evaluates the source blocks: a pending read would make the write copy the cache.
    """
    if src_blocks.size == 0:
        return kv_cache, dst_blocks
    pages = kv_cache[src_blocks]
    mx.eval(pages)
    written = mx.array(kv_cache)
    written[dst_blocks] = pages
    return written, dst_blocks


def gather_kv_cache(
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    block_table: Int32[mx.array, "max_blocks"],
    seq_len: int,
) -> tuple[Float[mx.array, "context kv_heads head_size"], Float[mx.array, "context kv_heads head_size"]]:
    """Return one request's keys and values; see :func:`metal_kernels.gather_kv_cache`."""
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    pages = kv_cache[block_table[: -(-seq_len // block_size)]]
    keys, values = (pages[:, half].reshape(-1, kv_heads, head_size)[:seq_len] for half in (0, 1))
    return keys, values

"""Reading and writing cache blocks with plain MLX operations."""

from typing import NamedTuple

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
    places = page_rows(np.asarray(slot_mapping), kv_cache.shape[2])
    return write_page_rows(key, value, kv_cache, places), slot_mapping


class PageRows(NamedTuple):
    """Where rows of a step go in pages seen as rows, for all layers with pages of one block size.

    ``rows`` are places of the keys, then of the values; ``kept`` are the rows that have one, None for all.
    """

    rows: mx.array | None
    kept: mx.array | None


def page_rows(slots: Int32[np.ndarray, "tokens"], block_size: int) -> PageRows:
    """Return where rows with some slots go."""
    kept = None
    if slots.size == 0 or slots.min() < 0:
        known = np.flatnonzero(slots >= 0)
        if known.size == 0:
            return PageRows(None, None)
        kept, slots = mx.array(known.astype(np.int32)), slots[known]
    key_rows = slots + slots // block_size * block_size
    return PageRows(mx.array(np.concatenate([key_rows, key_rows + block_size])), kept)


def write_page_rows(
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    places: PageRows,
) -> Float[mx.array, "blocks 2 block_size kv_heads head_size"]:
    """Return pages that have rows at their places."""
    if places.rows is None:
        return kv_cache
    if places.kept is not None:
        key, value = key[places.kept], value[places.kept]
    # Both halves in one scatter over the cache seen as rows: on a CPU half the time of one scatter each.
    written = kv_cache.reshape(-1, *kv_cache.shape[3:])
    written[places.rows] = mx.concatenate([key, value])
    return written.reshape(kv_cache.shape)


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

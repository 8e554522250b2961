"""The pages of a step's requests, copied for operations that do not know of writes in place."""

import math

import mlx.core as mx
import numpy as np

from metal_kernels.kernels.blocks import gather_blocks
from metal_kernels.ragged import RaggedBatch, device_array


def own_pages(kv_cache: mx.array, batch: RaggedBatch, order_token: mx.array | None) -> tuple[mx.array, RaggedBatch]:
    """Return the blocks in ``batch``'s table, and the batch renumbered to them; block 0 stays the null block.

    Args:
        kv_cache: ``[blocks, …]`` pages of an even number of elements.
        batch: The step.
        order_token: Of the last write.
    """
    block_ids, own = batch.once("own pages", lambda: _renumbered(batch))
    blocks, *page = kv_cache.shape
    pages = gather_blocks(kv_cache.reshape(blocks, 2, 1, 1, math.prod(page) // 2), block_ids, order_token)
    return pages.reshape(-1, *page), own


def _renumbered(batch: RaggedBatch) -> tuple[mx.array, RaggedBatch]:
    table = batch.block_table
    block_ids, renumbered = np.unique(np.append(0, table.ravel()), return_inverse=True)
    own = renumbered.ravel()[1:].reshape(table.shape).astype(np.int32)
    return device_array(block_ids), RaggedBatch(batch.query_start_loc, batch.seq_lens, own)

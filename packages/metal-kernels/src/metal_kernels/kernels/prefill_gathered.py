"""Attention of requests with several rows, one by one over copies of their keys, in MLX's fused kernel."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.kernels.blocks import gather_blocks
from metal_kernels.ragged import RaggedBatch, device_array


def prefill_gathered(
    query: Float[mx.array, "rows q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    batch: RaggedBatch,
    *,
    scale: float,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "rows q_heads head_size"]:
    """Attend each row to all keys of its own request up to its own; see :func:`metal_kernels.paged_attention`.

    Args:
        query: Rows of ``batch``.
        kv_cache: Pages of one layer, in the queries' dtype.
        batch: Requests that have rows.
        scale: Factor on the scores.
        sinks: Extra logit per query head.
        order_token: Of the last write.
    """
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    tables = batch.once(("block ids", block_size), lambda: _block_ids(batch, block_size))
    if sinks is not None:
        sinks = sinks.astype(query.dtype)
    outputs = []
    for request, block_ids in enumerate(tables):
        start, end = batch.query_start_loc[request : request + 2].tolist()
        pages = gather_blocks(kv_cache, block_ids, order_token)
        keys, values = (
            pages[:, half].reshape(1, -1, kv_heads, head_size)[:, : int(batch.seq_lens[request])].swapaxes(1, 2)
            for half in (0, 1)
        )
        rows = query[start:end].swapaxes(0, 1)[None]
        out = mx.fast.scaled_dot_product_attention(rows, keys, values, scale=scale, mask="causal", sinks=sinks)
        outputs.append(out[0].swapaxes(0, 1))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _block_ids(batch: RaggedBatch, block_size: int) -> list[mx.array]:
    """Return the blocks of each request; device arrays have eight elements at least, so they are cut on the device."""
    counts = -(-batch.seq_lens // block_size)
    return [device_array(row[:count])[: int(count)] for row, count in zip(batch.block_table, counts, strict=True)]

"""Attention of requests with several rows, one by one in MLX's fused kernel: over own rows or copies of pages."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.kernels.blocks import gather_halves
from metal_kernels.ragged import RaggedBatch


def prefill_gathered(
    query: Float[mx.array, "rows q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    batch: RaggedBatch,
    *,
    key: Float[mx.array, "rows kv_heads head_size"] | None = None,
    value: Float[mx.array, "rows kv_heads head_size"] | None = None,
    scale: float,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "rows q_heads head_size"]:
    """Attend each row to all keys of its own request up to its own; see :func:`metal_kernels.paged_attention`.

    Args:
        query: Rows of ``batch``.
        kv_cache: Pages of one layer, in the queries' dtype.
        batch: Requests that have rows.
        key: Keys of ``batch``, as written: all that a request without earlier rows sees.
        value: Values, likewise.
        scale: Factor on the scores.
        sinks: Extra logit per query head.
        order_token: Of the last write.
    """
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    if sinks is not None:
        sinks = sinks.astype(query.dtype)
    outputs = []
    starts = batch.once("starts", batch.query_start_loc.tolist)
    for request, seq_len in enumerate(batch.once("ends", batch.seq_lens.tolist)):
        start, end = starts[request : request + 2]
        rows = _own(query, start, end)
        if key is not None and value is not None and end - start == seq_len:
            keys, values = _own(key, start, end), _own(value, start, end)
        else:
            table, width = batch.on_device("block_table"), batch.block_table.shape[1]
            block_ids = table[request * width : request * width - (-seq_len // block_size)]
            halves = gather_halves(kv_cache, block_ids, order_token).reshape(2, 1, -1, kv_heads, head_size)
            keys, values = (half.squeeze(0)[:, :seq_len].swapaxes(1, 2) for half in mx.split(halves, 2))
        out = mx.fast.scaled_dot_product_attention(rows, keys, values, scale=scale, mask="causal", sinks=sinks)
        outputs.append(out.squeeze(0).swapaxes(0, 1))
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    # The rows are to be written also where nothing reads them from their pages.
    return joined if order_token is None else mx.depends([joined], [order_token])[0]


def _own(rows: mx.array, start: int, end: int) -> mx.array:
    """Return a request's rows as MLX's attention takes them, in as few views as it takes: an index would be a copy."""
    mine = rows if end - start == rows.shape[0] else rows[start:end]
    return mx.expand_dims(mine, 0).swapaxes(1, 2)

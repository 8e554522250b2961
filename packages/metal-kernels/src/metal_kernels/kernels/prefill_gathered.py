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
    table, width = batch.on_device("block_table"), batch.block_table.shape[1]
    outputs = []
    for request, seq_len in enumerate(batch.seq_lens.tolist()):
        start, end = batch.query_start_loc[request : request + 2].tolist()
        if key is not None and value is not None and end - start == seq_len:
            seen = key[start:end][None], value[start:end][None]
        else:
            block_ids = table[request * width : request * width - (-seq_len // block_size)]
            halves = gather_halves(kv_cache, block_ids, order_token).reshape(2, 1, -1, kv_heads, head_size)
            both = mx.split(halves, 2)  # an index would copy
            seen = both[0].squeeze(0)[:, :seq_len], both[1].squeeze(0)[:, :seq_len]
        rows, keys, values = (array.swapaxes(1, 2) for array in (query[start:end][None], *seen))
        out = mx.fast.scaled_dot_product_attention(rows, keys, values, scale=scale, mask="causal", sinks=sinks)
        outputs.append(out.squeeze(0).swapaxes(0, 1))
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    # The rows are to be written also where nothing reads them from their pages.
    return joined if order_token is None else mx.depends([joined], [order_token])[0]

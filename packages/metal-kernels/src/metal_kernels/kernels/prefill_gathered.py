"""Attention of requests with several rows, one by one over copies of their keys, in MLX's fused kernel."""

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from metal_kernels.kernels.source import PortableKernel, order_input
from metal_kernels.ragged import RaggedBatch, device_array

_THREADS = 256
_GATHER = PortableKernel(
    "prefill_gather", ("kv_cache_in", "blocks_in", "tokens_in", "order_in"), ("out",), "prefill_gather.metal"
)


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
    tables = batch.once("prefill tables", lambda: _tables(batch))
    if sinks is not None:
        sinks = sinks.astype(query.dtype)
    outputs = []
    for request, table in enumerate(tables):
        start, end = batch.query_start_loc[request : request + 2].tolist()
        keys, values = _gather(kv_cache, table, int(batch.seq_lens[request]), order_token)
        rows = query[start:end].swapaxes(0, 1)[None]
        out = mx.fast.scaled_dot_product_attention(rows, keys, values, scale=scale, mask="causal", sinks=sinks)
        outputs.append(out[0].swapaxes(0, 1))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _tables(batch: RaggedBatch) -> list[tuple[mx.array, mx.array]]:
    """Return the blocks of each request, and its number of keys, on the device."""
    return [
        (device_array(row), device_array(np.array([tokens])))
        for row, tokens in zip(batch.block_table, batch.seq_lens, strict=True)
    ]


def _gather(
    kv_cache: mx.array, table: tuple[mx.array, mx.array], tokens: int, order_token: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Return one request's keys and values, [1, kv_heads, tokens, head_size] each."""
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    (copied,) = _GATHER(
        [kv_cache, *table, order_input(order_token)],
        [((2, 1, kv_heads, tokens, head_size), kv_cache.dtype)],
        threadgroups=(-(-tokens * kv_heads * head_size // (8 * _THREADS)), 2),
        threads=_THREADS,
        template={"KV_HEADS": kv_heads, "HEAD_SIZE": head_size, "BLOCK_SIZE": block_size, "THREADS": _THREADS},
    )
    return copied[0], copied[1]

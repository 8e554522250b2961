"""Attention of requests with several rows, by the fastest route that serves them."""

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_kernels import reference
from metal_kernels.device import target
from metal_kernels.kernels.blocks import gather_blocks
from metal_kernels.kernels.dispatch import Accepted, PrefillWork, gathered_prefill, prefill_kernel
from metal_kernels.kernels.prefill_gathered import prefill_gathered
from metal_kernels.kernels.prefill_tiled import prefill_tiled
from metal_kernels.ragged import RaggedBatch, device_array


def prefill(
    query: Float[mx.array, "rows q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
    key: Float[mx.array, "rows kv_heads head_size"] | None = None,
    value: Float[mx.array, "rows kv_heads head_size"] | None = None,
) -> Float[mx.array, "rows q_heads head_size"]:
    """Attend each row to its own request's keys; see :func:`metal_kernels.paged_attention`.

    Args:
        query: Rows of ``batch``.
        kv_cache: Pages of one layer, written in place before ``order_token``.
        batch: Requests that have rows.
        scale: Factor on the scores.
        sliding_window: Keys a row sees at most.
        soft_cap: Cap of the scores.
        sinks: Extra logit per query head.
        order_token: Of the last write.
        key: Keys of ``batch``, as written.
        value: Values, likewise.
    """
    q_heads, head_size = query.shape[1:]
    kind = (target(), query.dtype, kv_cache.dtype)
    hidden = sliding_window is not None and sliding_window < batch.max_seq_len
    if key is None or value is None or not key.dtype == value.dtype == kv_cache.dtype:
        key = value = None
    masked = hidden or soft_cap is not None
    heads = (q_heads, kv_cache.shape[3], head_size)
    own_rows = key is not None
    gathered = batch.once(
        ("gathered prefill", kind, heads, masked, own_rows),
        lambda: gathered_prefill(*kind, heads, _work(batch, own_rows=own_rows), masked),
    )
    if isinstance(gathered, Accepted):
        return prefill_gathered(
            query, kv_cache, batch, key=key, value=value, scale=scale, sinks=sinks, order_token=order_token
        )
    window = sliding_window if hidden else None
    tiled = prefill_kernel(*kind, head_size)
    if isinstance(tiled, Accepted):
        return prefill_tiled(
            query,
            kv_cache,
            batch,
            tiled.variant,
            scale=scale,
            sliding_window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            order_token=order_token,
        )
    block_size = kv_cache.shape[2]
    block_ids, own = batch.once(("seen pages", window, block_size), lambda: _seen_pages(batch, window, block_size))
    pages = gather_blocks(kv_cache, block_ids, order_token)
    return reference.paged_attention(
        query, pages, own, scale=scale, sliding_window=window, soft_cap=soft_cap, sinks=sinks
    )


def _work(batch: RaggedBatch, *, own_rows: bool) -> PrefillWork:
    rows, keys = batch.query_lens.astype(np.int64), batch.seq_lens.astype(np.int64)
    pairs = rows * (keys - rows) + rows * (rows + 1) // 2
    copied = keys[rows < keys] if own_rows else keys
    return PrefillWork(batch.num_reqs, batch.num_tokens, int(copied.sum()), int(pairs.sum()), batch.max_seq_len)


def _seen_pages(
    batch: RaggedBatch, sliding_window: int | None, block_size: int
) -> tuple[Int32[mx.array, "gathered"], RaggedBatch]:
    """Return the blocks that ``batch`` reads, and the batch renumbered to them; block 0 stays the null block."""
    ends = batch.seq_lens
    begins = np.zeros_like(ends)
    if sliding_window is not None:
        begins = np.maximum(0, ends - batch.query_lens + 1 - sliding_window)
    column = np.arange(batch.block_table.shape[1])
    used = (column >= begins[:, None] // block_size) & (column < -(-ends[:, None] // block_size))
    table = np.where(used, batch.block_table, 0)
    block_ids, renumbered = np.unique(np.append(0, table.ravel()), return_inverse=True)
    own = renumbered.ravel()[1:].reshape(table.shape).astype(np.int32)
    return device_array(block_ids), RaggedBatch(batch.query_start_loc, ends, own)

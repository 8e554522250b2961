"""Attention of requests with several rows, all in one kernel."""

from math import e, log2

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_kernels.kernels.dispatch import PrefillVariant
from metal_kernels.kernels.source import PortableKernel, constants, order_input
from metal_kernels.ragged import RaggedBatch, device_array

_KERNEL = PortableKernel(
    "prefill_tiled",
    ("query_in", "kv_cache_in", "block_table_in", "work_in", "factors_in", "sinks_in", "order_in"),
    ("out",),
    "prefill_tiled.metal",
    headers=("matrix", "tiles", "tile_rows"),
)


def prefill_tiled(
    query: Float[mx.array, "rows q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    batch: RaggedBatch,
    variant: PrefillVariant,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "rows q_heads head_size"]:
    """Attend each row to its own request's keys; see :func:`metal_kernels.paged_attention`.

    Args:
        query: Rows of ``batch``, strided as they may be.
        kv_cache: Pages of one layer, in the queries' dtype.
        batch: Requests; any number of rows each, at least one in all.
        variant: From :func:`metal_kernels.kernels.prefill_kernel`.
        scale: Factor on the scores.
        sliding_window: Keys a row sees at most.
        soft_cap: Cap of the scores.
        sinks: Extra logit per query head.
        order_token: Of the last write.
    """
    q_heads, head_size = query.shape[1:]
    _, _, block_size, kv_heads, _ = kv_cache.shape
    rows = 16 * variant.simdgroups
    work, blocks = batch.once(("prefill work", rows), lambda: _work(batch, rows))
    factors = (scale * log2(e), 0.0) if soft_cap is None else (scale / soft_cap, soft_cap * log2(e))
    (out,) = _KERNEL(
        [
            query,
            kv_cache,
            batch.on_device("block_table"),
            work,
            constants(*factors),
            constants(0.0) if sinks is None else sinks.astype(mx.float32),
            order_input(order_token),
        ],
        [(query.shape, query.dtype)],
        threadgroups=(blocks, q_heads),
        threads=variant.simdgroups * 32,
        template={
            "T": query.dtype,
            "HEAD_SIZE": head_size,
            "BLOCK_SIZE": block_size,
            "KV_HEADS": kv_heads,
            "GROUP": q_heads // kv_heads,
            "SIMDGROUPS": variant.simdgroups,
            "WINDOW": sliding_window or 0,
            "SOFT_CAP": soft_cap is not None,
            "SINKS": sinks is not None,
        },
    )
    return out


def _work(batch: RaggedBatch, rows: int) -> tuple[Int32[mx.array, "elements"], int]:
    """Return first row, rows, start of the block table and first position of each block of rows, longest first."""
    counts = -(-batch.query_lens // rows)
    request = np.repeat(np.arange(batch.num_reqs), counts)
    offset = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * rows
    position = (batch.seq_lens - batch.query_lens)[request] + offset
    work = np.stack(
        [
            batch.query_start_loc[request] + offset,
            np.minimum(rows, batch.query_lens[request] - offset),
            request * batch.block_table.shape[1],
            position,
        ],
        axis=1,
    )
    return device_array(work[np.argsort(-position, kind="stable")]), len(work)

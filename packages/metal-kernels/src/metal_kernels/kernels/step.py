"""Attention of a whole step: one-row requests in the decode kernel, the others over gathered pages."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_kernels import reference
from metal_kernels.decode_plan import plan_decode
from metal_kernels.kernels.blocks import gather_blocks
from metal_kernels.kernels.dispatch import Accepted, DecodeVariant, Rejected
from metal_kernels.kernels.paged_decode import paged_decode
from metal_kernels.ragged import RaggedBatch, device_array


@dataclass(frozen=True, eq=False)
class _Gathered:
    """Some requests as a batch of their own, over a cache of their own blocks only."""

    batch: RaggedBatch
    block_ids: Int32[mx.array, "gathered"]
    rows: Int32[np.ndarray, "rows"]


def paged_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    batch: RaggedBatch,
    decode: Accepted[DecodeVariant] | Rejected,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend each row to its own request's keys; see :func:`metal_kernels.paged_attention`.

    Args:
        query: Rows of the step.
        kv_cache: Pages of one layer, written in place before ``order_token``.
        batch: The step.
        decode: What serves the one-row requests; if nothing does, they are gathered too.
        scale: Factor on the scores.
        sliding_window: Keys a row sees at most.
        soft_cap: Cap of the scores.
        sinks: Extra logit per query head.
        order_token: Of the last write.
    """
    if batch.num_tokens == 0:
        return query
    outputs, rows = [], []
    most = 1 if isinstance(decode, Accepted) else 0  # rows of a request that is not gathered
    singles, others = batch.once(("requests by rows", most), lambda: _by_rows(batch, most))
    if isinstance(decode, Accepted) and singles.size:
        per_range = kv_cache.shape[3] * decode.variant.parts * decode.variant.simdgroups
        plan = batch.once(
            ("decode plan", sliding_window, per_range),
            lambda: plan_decode(batch, singles, sliding_window, per_range),
        )
        out = paged_decode(
            query,
            kv_cache,
            plan,
            decode.variant,
            scale=scale,
            soft_cap=soft_cap,
            sinks=sinks,
            order_token=order_token,
        )
        outputs.append(out)
        rows.append(batch.query_start_loc[singles])
    if others.size:
        block_size = kv_cache.shape[2]
        part = batch.once(
            ("gathered", sliding_window, block_size, most),
            lambda: _gathered(batch, others, sliding_window, block_size),
        )
        in_order = len(part.rows) == int(part.rows[-1] - part.rows[0]) + 1
        own = query[int(part.rows[0]) : int(part.rows[-1]) + 1] if in_order else query[mx.array(part.rows)]
        pages = gather_blocks(kv_cache, part.block_ids, order_token)
        out = reference.paged_attention(
            own, pages, part.batch, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks
        )
        outputs.append(out)
        rows.append(part.rows)
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    restore = batch.once(("restore order", most), lambda: _restoring(np.concatenate(rows)))
    return joined if restore is None else joined[restore]


def _by_rows(batch: RaggedBatch, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the requests with exactly one row, if ``most`` is 1, and those with more than ``most`` rows."""
    singles, others = (batch.query_lens == 1) & (most == 1), batch.query_lens > most
    return np.flatnonzero(singles).astype(np.int32), np.flatnonzero(others).astype(np.int32)


def _restoring(order: np.ndarray) -> mx.array | None:
    """Return the index that sorts the rows ``order``; None if they are sorted."""
    return None if (np.diff(order) == 1).all() else mx.array(np.argsort(order).astype(np.uint32))


def _gathered(
    batch: RaggedBatch, requests: Int32[np.ndarray, "some"], sliding_window: int | None, block_size: int
) -> _Gathered:
    """Renumber the blocks that ``requests`` read; block 0 stays the null block."""
    query_lens, ends = batch.query_lens[requests], batch.seq_lens[requests]
    begins = np.zeros_like(ends) if sliding_window is None else np.maximum(0, ends - query_lens + 1 - sliding_window)
    column = np.arange(batch.block_table.shape[1])
    used = (column >= begins[:, None] // block_size) & (column < -(-ends[:, None] // block_size))
    table = np.where(used, batch.block_table[requests], 0)
    block_ids, renumbered = np.unique(np.append(0, table.ravel()), return_inverse=True)
    rows = np.concatenate([np.arange(batch.query_start_loc[r], batch.query_start_loc[r + 1]) for r in requests])
    own = RaggedBatch(
        np.append(0, np.cumsum(query_lens)).astype(np.int32),
        ends,
        renumbered.ravel()[1:].reshape(table.shape).astype(np.int32),
    )
    return _Gathered(own, device_array(block_ids), rows.astype(np.int32))

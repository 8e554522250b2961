"""Paged attention with plain MLX operations."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from metal_kernels.ragged import RaggedBatch

# Decodes share one padded attention call while padding at most doubles what is read.
_MAX_PADDING = 2.0


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows that one dense attention call computes: ``requests`` × ``query_len`` rows."""

    start: int  # first row
    requests: int
    query_len: int
    context: int  # keys read per request
    blocks: mx.array | slice  # pages read, [requests, blocks], or consecutive ones of a single request
    mask: mx.array | str | None


def paged_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend over block tables; see :func:`metal_kernels.paged_attention`.

    ``order_token`` is not needed: the written cache is a new array, so its readers follow its writer.
    """
    block_size = kv_cache.shape[2]
    pieces = batch.once(
        ("pieces", sliding_window, block_size), lambda: _plan(batch, sliding_window, block_size)
    )
    outputs = [_attend(query, kv_cache, piece, scale, soft_cap, sinks) for piece in pieces]
    if not outputs:
        return mx.zeros_like(query)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _attend(
    query: mx.array,
    kv_cache: mx.array,
    piece: _Piece,
    scale: float,
    soft_cap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    rows = query[piece.start : piece.start + piece.requests * piece.query_len]
    queries = rows.reshape(piece.requests, piece.query_len, -1, head_size).transpose(0, 2, 1, 3)
    pages = kv_cache[piece.blocks].reshape(piece.requests, -1, 2, block_size, kv_heads, head_size)
    halves = pages.transpose(2, 0, 4, 1, 3, 5).reshape(2, piece.requests, kv_heads, -1, head_size)
    keys, values = (half[:, :, : piece.context] for half in halves)
    if soft_cap is None:
        out = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=piece.mask, sinks=sinks
        )
    else:
        out = _soft_capped(queries, keys, values, scale, soft_cap, piece.mask, sinks)
    return out.transpose(0, 2, 1, 3).reshape(rows.shape)


def _soft_capped(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    soft_cap: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Return attention whose scores pass through ``soft_cap * tanh(score / soft_cap)``; softmax in float32."""
    requests, q_heads, query_len, head_size = queries.shape
    kv_heads, context = keys.shape[1:3]
    grouped = queries.reshape(requests, kv_heads, q_heads // kv_heads, query_len, head_size)
    scores = (grouped @ keys[:, :, None].swapaxes(-1, -2)).astype(mx.float32) * scale
    scores = soft_cap * mx.tanh(scores / soft_cap)
    if isinstance(mask, str):
        mask = mx.array(
            _visible(np.arange(context - query_len, context)[None], np.arange(context)[None], None)
        )
    if mask is not None:
        scores = mx.where(mask[:, :, None] if mask.ndim == 4 else mask, scores, -mx.inf)
    if sinks is not None:
        column = sinks.astype(mx.float32).reshape(kv_heads, -1, 1, 1)
        column = mx.broadcast_to(column, (*scores.shape[:-1], 1))
        weights = mx.softmax(mx.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    else:
        weights = mx.softmax(scores, axis=-1)
    out = weights.astype(values.dtype) @ values[:, :, None]
    return out.reshape(requests, q_heads, query_len, head_size)


def _plan(batch: RaggedBatch, window: int | None, block_size: int) -> list[_Piece]:
    """Cut the batch into dense calls: neighbouring decodes together, every other request alone."""
    pieces = []
    for first, last in _decode_runs(batch):
        pieces.append(_piece(batch, first, last, window, block_size))
    pieces += [
        _piece(batch, request, request + 1, window, block_size)
        for request in range(batch.num_decodes, batch.num_reqs)
        if batch.query_lens[request]
    ]
    return pieces


def _decode_runs(batch: RaggedBatch) -> list[tuple[int, int]]:
    """Return ranges of leading one-row requests that are worth padding to one length."""
    runs, first = [], 0
    lens = batch.seq_lens[: batch.num_decodes].astype(np.int64)
    for last in range(1, len(lens) + 1):
        run = lens[first : last + 1]
        if last == len(lens) or run.max() * len(run) > _MAX_PADDING * run.sum() + 64 * len(run):
            runs.append((first, last))
            first = last
    return runs


def _piece(batch: RaggedBatch, first: int, last: int, window: int | None, block_size: int) -> _Piece:
    seq_lens, query_len = batch.seq_lens[first:last], int(batch.query_lens[first])
    # The first row of a request sees the earliest key; whole pages before it are not read.
    earliest = np.maximum(seq_lens - query_len - (window or 1) + 1, 0) if window else np.zeros_like(seq_lens)
    first_block = earliest // block_size
    keys = int((seq_lens - first_block * block_size).max())
    columns = np.minimum(
        first_block[:, None] + np.arange(-(-keys // block_size)), batch.block_table.shape[1] - 1
    )
    table = np.take_along_axis(batch.block_table[first:last], columns, axis=1)
    key_positions = first_block[:, None] * block_size + np.arange(keys)
    query_positions = (seq_lens - query_len)[:, None] + np.arange(query_len)
    visible = _visible(query_positions, key_positions, window)
    mask: mx.array | str | None = None
    if not visible.all():
        plain = last - first == 1 and query_len > 1 and (window is None or window >= int(seq_lens[0]))
        mask = "causal" if plain else mx.array(visible)
    blocks: mx.array | slice = mx.array(table)
    if len(table) == 1 and (np.diff(table[0]) == 1).all():
        blocks = slice(int(table[0, 0]), int(table[0, -1]) + 1)
    return _Piece(int(batch.query_start_loc[first]), last - first, query_len, keys, blocks, mask)


def _visible(query_positions: np.ndarray, key_positions: np.ndarray, window: int | None) -> np.ndarray:
    """Return which keys each row sees, ``[requests, 1, rows, keys]``."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return visible[:, None]

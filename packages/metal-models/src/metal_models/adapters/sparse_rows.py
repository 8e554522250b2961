"""Picks keys for every row by the scores of an indexer, and attends to the picked ones only."""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from metal_kernels import RaggedBatch

# Elements of the largest intermediate array; more rows are done in several pieces.
_MAX_ELEMENTS = 1 << 26

# Scores of some rows [rows, …] of the step against all keys of their request, [heads, rows, keys].
Score = Callable[[slice, mx.array], mx.array]


def pick(pages: mx.array, batch: RaggedBatch, count: int, score: Score, heads: int) -> mx.array:
    """Return, for every row, the positions of the ``count`` best keys it may see, and -1 for none.

    Args:
        pages: Index keys, ``[blocks, block_size, size]``.
        batch: The step.
        count: Keys to pick.
        score: Takes rows of the step and their request's keys ``[keys, size]``.
        heads: Leading axis of what ``score`` makes on its way, to bound memory by.

    Returns:
        int32 ``[tokens, count]``.
    """
    picked = []
    for rows, keys, positions in requests(pages, batch, heads):
        if len(keys) <= count:
            chosen = mx.broadcast_to(mx.arange(count, dtype=mx.int32), (len(positions), count))
        else:
            visible = mx.arange(len(keys), dtype=mx.int32) <= positions[:, None]
            scores = mx.where(visible, score(rows, keys), -mx.inf)
            chosen = mx.argpartition(scores, kth=-count, axis=-1)[:, -count:].astype(mx.int32)
        picked.append(mx.where(chosen <= positions[:, None], chosen, -1))
    return picked[0] if len(picked) == 1 else mx.concatenate(picked)


def requests(pages: mx.array, batch: RaggedBatch, heads: int) -> Iterator[tuple[slice, mx.array, mx.array]]:
    """Yield rows of one request, its cached rows and the positions of the former, few enough at a time.

    Args:
        pages: ``[blocks, block_size, *row]``.
        batch: The step.
        heads: Leading axis of the scores ``[heads, rows, keys]`` that are made of them.
    """
    block_size = pages.shape[1]
    for request, end in enumerate(batch.seq_lens.tolist()):
        first, last = batch.query_start_loc[request : request + 2].tolist()
        if first == last:
            continue
        blocks = mx.array(batch.block_table[request, : -(-end // block_size)])
        keys = pages[blocks].reshape(-1, *pages.shape[2:])[:end]
        piece = max(1, _MAX_ELEMENTS // (heads * end))
        for start in range(first, last, piece):
            stop = min(last, start + piece)
            position = end - last + start
            yield slice(start, stop), keys, mx.arange(position, position + stop - start, dtype=mx.int32)


def slots(batch: RaggedBatch, rows: slice, positions: mx.array, block_size: int) -> tuple[mx.array, mx.array]:
    """Return block and offset of some positions of each row's own request.

    Args:
        batch: The step.
        rows: Rows of the step.
        positions: int32 ``[rows, picked]``; -1 stands for position 0.
        block_size: Tokens of a block.

    Returns:
        Two arrays ``[rows, picked]`` to index pages with.
    """
    owners = np.repeat(np.arange(batch.num_reqs, dtype=np.int32), batch.query_lens)[rows]
    table = batch.once("block table", lambda: mx.array(batch.block_table))
    safe = mx.maximum(positions, 0)
    return table[mx.array(owners)[:, None], safe // block_size], safe % block_size


def pieces(tokens: int, elements: int) -> Iterator[slice]:
    """Yield slices of rows, so that ``elements`` for each row stay few."""
    piece = max(1, _MAX_ELEMENTS // elements)
    for start in range(0, tokens, piece):
        yield slice(start, min(tokens, start + piece))

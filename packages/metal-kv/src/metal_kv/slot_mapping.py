"""Where each new token's keys and values go in the cache, computed on the host."""

import numpy as np
from jaxtyping import Int32

from metal_kv.errors import BlockTableError


def token_positions(
    query_start_loc: Int32[np.ndarray, "reqs_plus_one"], seq_lens: Int32[np.ndarray, "reqs"]
) -> Int32[np.ndarray, "tokens"]:
    """Return the position of every row of a step in its own sequence.

    Args:
        query_start_loc: First row of every request, then the number of rows.
        seq_lens: Context length of every request, the step's rows included.
    """
    query_lens = np.diff(query_start_loc)
    first_minus_row = seq_lens - query_lens - query_start_loc[:-1]
    rows = np.arange(query_start_loc[-1], dtype=np.int32)
    positions: np.ndarray = rows + np.repeat(first_minus_row, query_lens)
    return positions


def slot_mapping(
    query_start_loc: Int32[np.ndarray, "reqs_plus_one"],
    positions: Int32[np.ndarray, "tokens"],
    block_table: Int32[np.ndarray, "reqs max_blocks"],
    block_size: int,
) -> Int32[np.ndarray, "tokens"]:
    """Return the cache slot of every row of a step: ``block_id * block_size + offset``.

    A row whose block is the null block gets slot -1, which cache writes skip.

    Args:
        query_start_loc: First row of every request, then the number of rows.
        positions: Position of every row in its own sequence, from 0.
        block_table: Block ids per request, padded on the right with 0.
        block_size: Tokens per block.

    Raises:
        BlockTableError: A position lies beyond the table's last column.
    """
    blocks, offsets = np.divmod(positions, np.int32(block_size))
    if blocks.size and blocks.max() >= block_table.shape[1]:
        raise BlockTableError(
            f"[slot_mapping] expected positions below {block_table.shape[1] * block_size} "
            f"({block_table.shape[1]} blocks of {block_size}), got {int(positions.max())}. "
            "Allocate the blocks of a request before building its step."
        )
    requests = np.repeat(np.arange(block_table.shape[0]), np.diff(query_start_loc))
    block_ids = block_table[requests, blocks]
    slots: np.ndarray = block_ids * np.int32(block_size) + offsets
    slots[block_ids == 0] = -1
    return slots

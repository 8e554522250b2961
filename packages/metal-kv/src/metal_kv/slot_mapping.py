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
        raise _beyond(positions, block_table, block_size)
    requests = np.repeat(np.arange(block_table.shape[0]), np.diff(query_start_loc))
    block_ids = block_table[requests, blocks]
    slots: np.ndarray = block_ids * np.int32(block_size) + offsets
    slots[block_ids == 0] = -1
    return slots


def decode_slot_mapping(
    positions: Int32[np.ndarray, "reqs"], block_table: Int32[np.ndarray, "reqs max_blocks"], block_size: int
) -> Int32[np.ndarray, "reqs"]:
    """Return what ``slot_mapping`` does for a step in which every request has one row.

    Args:
        positions: Position of each request's row, from 0.
        block_table: As there.
        block_size: As there.

    Raises:
        BlockTableError: A position lies beyond the table's last column.
    """
    blocks = positions // np.int32(block_size)
    try:
        block_ids = block_table[np.arange(len(positions)), blocks]
    except IndexError:
        raise _beyond(positions, block_table, block_size) from None
    slots: np.ndarray = positions + (block_ids - blocks) * np.int32(block_size)
    if not block_ids.all():
        slots[block_ids == 0] = -1
    return slots


def _beyond(positions: np.ndarray, block_table: np.ndarray, block_size: int) -> BlockTableError:
    return BlockTableError(
        f"[slot_mapping] expected positions below {block_table.shape[1] * block_size} "
        f"({block_table.shape[1]} blocks of {block_size}), got {int(positions.max())}. "
        "Allocate the blocks of a request before building its step."
    )

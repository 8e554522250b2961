import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metal_kv import BlockTableError, slot_mapping, token_positions


@st.composite
def steps(draw):
    """A ragged step over disjoint shuffled blocks: (query_start_loc, seq_lens, block_table, block_size)."""
    block_size = draw(st.integers(1, 9))
    lens = draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=0, max_size=6))
    seq_lens = np.array([computed + new for computed, new in lens], np.int32)
    needed = [-(-int(n) // block_size) for n in seq_lens]
    ids = draw(st.permutations(range(1, sum(needed) + 4)))
    table = np.zeros((len(lens), max([1, *needed])), np.int32)
    start = 0
    for row, count in zip(table, needed, strict=True):
        row[:count] = ids[start : start + count]
        start += count
    query_start_loc = np.cumsum([0, *(new for _, new in lens)]).astype(np.int32)
    return query_start_loc, seq_lens, table, block_size


@given(steps())
def test_slots_are_those_of_a_plain_loop_and_all_different(step):
    query_start_loc, seq_lens, table, block_size = step
    positions = token_positions(query_start_loc, seq_lens)
    slots = slot_mapping(query_start_loc, positions, table, block_size)
    expected_positions, expected_slots = [], []
    for request, seq_len in enumerate(seq_lens):
        query_len = query_start_loc[request + 1] - query_start_loc[request]
        for position in range(seq_len - query_len, seq_len):
            expected_positions.append(position)
            expected_slots.append(table[request, position // block_size] * block_size + position % block_size)
    assert positions.tolist() == expected_positions
    assert slots.tolist() == expected_slots
    assert len(set(expected_slots)) == len(expected_slots)
    assert positions.dtype == slots.dtype == np.int32
    assert not np.any(slots // block_size == 0)


def test_rows_of_the_null_block_are_not_written():
    starts, lens = np.array([0, 4], np.int32), np.array([4], np.int32)
    slots = slot_mapping(starts, token_positions(starts, lens), np.array([[0, 3]], np.int32), 2)
    assert slots.tolist() == [-1, -1, 6, 7]


def test_a_position_beyond_the_table_is_refused():
    starts, lens = np.array([0, 1], np.int32), np.array([5], np.int32)
    with pytest.raises(BlockTableError, match=r"positions below 4 \(2 blocks of 2\), got 4"):
        slot_mapping(starts, token_positions(starts, lens), np.array([[1, 2]], np.int32), 2)

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from metal_kv import BlockTable, BlockTableError, kernel_block_table

ROWS, COLUMNS = 5, 12
row = st.integers(0, ROWS - 1)
ids = st.lists(st.integers(1, 99), max_size=COLUMNS)


class TableAgainstLists(RuleBasedStateMachine):
    ratio = 1

    def __init__(self):
        super().__init__()
        self.table = BlockTable(ROWS, COLUMNS, self.ratio)
        self.lists = [[] for _ in range(ROWS)]

    @rule(row=row, ids=ids)
    def add(self, row, ids):
        self.table.add_row(row, ids)
        self.lists[row] = list(ids)

    @rule(row=row, ids=ids)
    def append(self, row, ids):
        if len(self.lists[row]) + len(ids) > COLUMNS:
            with pytest.raises(BlockTableError, match="at most 12 blocks"):
                self.table.append_row(row, ids)
        else:
            self.table.append_row(row, ids)
            self.lists[row] += ids

    @rule(row=row)
    def clear(self, row):
        self.table.clear_row(row)
        self.lists[row] = []

    @rule(source=row, destination=row)
    def move(self, source, destination):
        self.table.move_row(source, destination)
        if source != destination:
            self.lists[destination], self.lists[source] = self.lists[source], []

    @rule(first=row, second=row)
    def swap(self, first, second):
        self.table.swap_row(first, second)
        self.lists[first], self.lists[second] = self.lists[second], self.lists[first]

    def check_rows(self, indices, got):
        width = max([1, *(len(self.lists[i]) for i in indices)])
        expected = np.zeros((len(indices), width), np.int32)
        for out, i in zip(expected, indices, strict=True):
            out[: len(self.lists[i])] = self.lists[i]
        np.testing.assert_array_equal(got, kernel_block_table(expected, self.ratio))
        assert got.dtype == np.int32

    @rule(indices=st.lists(row, max_size=ROWS, unique=True))
    def some_rows(self, indices):
        self.check_rows(indices, self.table.rows(indices))

    @rule(num_rows=st.integers(0, ROWS))
    def first_rows(self, num_rows):
        self.check_rows(range(num_rows), self.table.rows(num_rows))

    @invariant()
    def same_as_lists(self):
        assert self.table.num_blocks.tolist() == [len(ids) for ids in self.lists]
        assert [self.table.row(i).tolist() for i in range(ROWS)] == self.lists
        self.check_rows(range(ROWS), self.table.rows(ROWS))


class TranslatedTableAgainstLists(TableAgainstLists):
    ratio = 5


test_table_equals_lists = TableAgainstLists.TestCase
test_table_in_kernel_blocks_equals_lists = TranslatedTableAgainstLists.TestCase


def test_what_is_outside_the_table_is_refused():
    table = BlockTable(2, 3)
    assert (table.max_reqs, table.max_blocks) == (2, 3)
    for misuse in (
        lambda: table.add_row(2, [1]),
        lambda: table.add_row(-1, [1]),
        lambda: table.add_row(0, [1, 2, 3, 4]),
        lambda: table.append_row(0, [-1]),
        lambda: table.rows(3),
        lambda: table.rows([0, 2]),
        lambda: BlockTable(0, 3),
        lambda: BlockTable(1, 3, 0),
    ):
        with pytest.raises(BlockTableError, match="expected"):
            misuse()
    assert table.num_blocks.tolist() == [0, 0]


def test_lengths_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        BlockTable(1, 1).num_blocks[0] = 1


def test_kernel_blocks_follow_their_block_and_the_null_block_stays():
    table = np.array([[3, 1, 0], [2, 0, 0]], np.int32)
    assert kernel_block_table(table, 2).tolist() == [[6, 7, 2, 3, 0, 0], [4, 5, 0, 0, 0, 0]]
    assert kernel_block_table(table, 1) is table
    assert kernel_block_table(table[:0], 2).shape == (0, 6)

import mlx.core as mx
import numpy as np
import pytest

from metal_kv import AttentionMetadata, BlockTableError, SpecError

TABLE = np.array([[5, 2], [1, 4]], np.int32)


def test_a_step_of_a_decode_and_a_prompt():
    metadata = AttentionMetadata.build([0, 1, 4], [6, 3], TABLE, 4)
    assert metadata.num_tokens == 4
    assert metadata.positions.tolist() == [5, 0, 1, 2]
    assert metadata.slot_mapping.tolist() == [2 * 4 + 1, 4, 5, 6]
    assert metadata.slot_mapping.dtype == metadata.positions.dtype == mx.int32
    assert metadata.batch.query_start_loc.tolist() == [0, 1, 4]
    assert metadata.batch.seq_lens.tolist() == [6, 3]
    assert metadata.batch.block_table.tolist() == TABLE.tolist()


def test_groups_share_positions():
    first = AttentionMetadata.build([0, 1, 4], [6, 3], TABLE, 4)
    second = AttentionMetadata.build([0, 1, 4], [6, 3], TABLE, 8, first.positions)
    assert second.positions is first.positions
    assert second.slot_mapping.tolist() == [5 * 8 + 5, 8, 9, 10]


def test_a_group_takes_rows_from_another():
    first = AttentionMetadata.build([0, 1, 4], [6, 3], TABLE, 4)
    second = AttentionMetadata.build([0, 1, 4], [6, 3], TABLE[:, ::-1].copy(), 8, like=first)
    assert second.positions is first.positions
    assert second.slot_mapping.tolist() == [2 * 8 + 5, 4 * 8, 4 * 8 + 1, 4 * 8 + 2]
    assert second.batch.block_table.tolist() == TABLE[:, ::-1].tolist()


def test_a_step_that_only_decodes_has_the_slots_that_it_has_beside_a_prompt():
    table = np.array([[5, 2], [0, 4], [1, 0]], np.int32)
    decode = AttentionMetadata.build([0, 1, 2], [6, 3], table[:2], 4)
    mixed = AttentionMetadata.build([0, 1, 2, 4], [6, 3, 2], table, 4)
    assert decode.slot_mapping.tolist() == mixed.slot_mapping.tolist()[:2] == [2 * 4 + 1, -1]
    assert decode.positions.tolist() == mixed.positions.tolist()[:2]
    with pytest.raises(BlockTableError, match="below 8"):
        AttentionMetadata.build([0, 1, 2], [6, 9], table[:2], 4)


def test_kernel_blocks_change_the_table_and_not_the_slots():
    whole = AttentionMetadata.build([0, 1, 4], [6, 3], TABLE, 4)
    cut = AttentionMetadata.build([0, 1, 4], [6, 3], TABLE, 4, kernel_block_size=2)
    assert cut.slot_mapping.tolist() == whole.slot_mapping.tolist()
    assert cut.batch.block_table.tolist() == [[10, 11, 4, 5], [2, 3, 8, 9]]
    with pytest.raises(SpecError, match="divides 4, got 3"):
        AttentionMetadata.build([0, 1, 4], [6, 3], TABLE, 4, kernel_block_size=3)

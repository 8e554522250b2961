import mlx.core as mx
import pytest

from metal_kv import FullAttentionSpec, RecurrentStateSpec, SlidingWindowSpec, SpecError, bytes_per_block, group_layers

FULL = FullAttentionSpec(16, 4, 64, dtype=mx.float16)
WIDE = FullAttentionSpec(16, 8, 64, dtype=mx.float16)
WINDOW = SlidingWindowSpec(16, 8, 64, dtype=mx.float16, sliding_window=128)


def named(*specs):
    return {str(index): spec for index, spec in enumerate(specs)}


def test_layers_of_one_kind_are_one_group_whatever_their_heads():
    [group] = group_layers(named(FULL, WIDE, FULL))
    assert group.specs == (FULL, WIDE, FULL)


def test_windows_are_cut_into_groups_as_large_as_the_smallest_kind():
    groups = group_layers(named(*[FULL, WINDOW, WINDOW] * 4))
    assert [len(group.layer_names) for group in groups] == [4, 4, 4]
    assert groups[0].block_size == 32
    assert groups[1].layer_names == ("1", "4", "7", "10")
    assert bytes_per_block(groups) == 4 * WINDOW.page_size_bytes


def test_a_few_layers_more_of_one_kind_are_not_worth_a_group():
    assert [len(group.layer_names) for group in group_layers(named(*[WINDOW, WIDE] * 4, WIDE))] == [4, 5]


def test_states_are_padded_to_the_page():
    state = RecurrentStateSpec(16, ((4, 8),), (mx.float32,))
    groups = group_layers(named(FULL, state, FULL, state))
    assert groups[1].specs[0].page_size_bytes == FULL.page_size_bytes


def test_pages_that_no_block_size_makes_equal_are_refused():
    with pytest.raises(SpecError, match="divide 49152 bytes"):
        group_layers(named(FullAttentionSpec(16, 12, 64, dtype=mx.float16), WINDOW))
